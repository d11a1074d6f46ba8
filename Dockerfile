# Trivium in a container: for processors as it is, for CUDA with
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve,quant,gguf

# Debian keeps one version of a package in a release: a pinned one is gone with the next repair of it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/trivium
COPY pyproject.toml README.md LICENSE ./
COPY trivium ./trivium
# Versions are bounded in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "torch>=2.9,<2.14" --index-url "${TORCH_INDEX}" \
    && pip install --no-cache-dir ".[${EXTRAS}]"

# Whoever `docker run --user` names has no entry in /etc/passwd, but needs a home and a name for caches.
RUN useradd --uid 1000 --create-home person && chmod 777 /home/person && install -d -o person /work
ENV HOME=/home/person USER=person
USER 1000
WORKDIR /work

ENTRYPOINT ["trivium"]
CMD ["--help"]
