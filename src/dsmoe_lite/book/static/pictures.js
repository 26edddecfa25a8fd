// On a phone a picture keeps its size and scrolls (book.css): the keyboard must reach it.
document.addEventListener("DOMContentLoaded", () => {
  for (const picture of document.querySelectorAll('article p > img[src$=".svg"]')) picture.parentElement.tabIndex = 0;
});
