# The course in a container, installed from its wheel:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<index of torch CPU builds> --tag dsmoe-lite .
#   docker run --rm --publish 127.0.0.1:8888:8888 --volume dsmoe-lite:/course dsmoe-lite
# Without the build argument pip takes torch's CUDA build, several GB more. work/ and runs/ stay in the volume.

FROM python:3.12.12-slim-bookworm AS wheel
WORKDIR /source
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

# g++ compiles the kernels of chapter 10 for the CPU; charts need a font.
FROM python:3.12.12-slim-bookworm AS system
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends fontconfig fonts-dejavu-core g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --home-dir /course --uid 1000 reader
WORKDIR /course

# What the tests need as well; .devcontainer uses this stage and installs the clone.
FROM system AS developer
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends chromium git make \
    && rm -rf /var/lib/apt/lists/*
USER 1000

FROM system AS course
ARG PIP_EXTRA_INDEX_URL=""
COPY constraints.txt /wheel/
COPY --from=wheel /wheel/ /wheel/
RUN set -- /wheel/*.whl \
    && python -m pip install --no-cache-dir --constraint /wheel/constraints.txt "$1[course]"
USER 1000
EXPOSE 8888
CMD ["dsmoe", "lab", "--no-browser", "--ip", "0.0.0.0", "--port", "8888"]
