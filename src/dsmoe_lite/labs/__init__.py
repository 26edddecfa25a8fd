"""What readers and instructors need around the chapters: copies, checks, parameters."""
