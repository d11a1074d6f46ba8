# Trivium in a container: for processors as it is, for CUDA with
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=serve,quant,gguf

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/trivium
COPY pyproject.toml README.md LICENSE ./
COPY trivium ./trivium
RUN pip install --no-cache-dir torch --index-url "${TORCH_INDEX}" \
    && pip install --no-cache-dir ".[${EXTRAS}]"

RUN useradd --create-home person
USER person
WORKDIR /work

ENTRYPOINT ["trivium"]
CMD ["--help"]
