# What GPU pods run: the console script `hcodec`, torch, no Airflow.
#
# BASE_IMAGE     Debian or Ubuntu with Python 3.11 or later. torch's wheels bring CUDA's libraries, so the smallest
#                CUDA image will do: it makes the container runtime hand over the driver.
# weights        to bake codecs in: --build-context weights=FOLDER of <digest>/codec.json and <digest>/model.safetensors.
# TORCH, TORCH_INDEX  which torch, and from which index (empty: pip's own).
# pip's configuration, if a mirror is needed, is the build secret `pip_config`: it stays out of the image.
ARG BASE_IMAGE=docker.io/nvidia/cuda:12.9.1-base-ubuntu24.04

# Stands for the build context of the same name: no weights.
FROM scratch AS weights
COPY LICENSE /LICENSE

FROM ${BASE_IMAGE} AS system
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# No versions: which there are depends on the base image, and the base image is what gets pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM system AS build
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/hcodec
WORKDIR /build
COPY constraints.txt ./
RUN --mount=type=secret,id=pip_config,target=/etc/pip.conf \
    /opt/hcodec/bin/pip install ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} --constraint constraints.txt "${TORCH}"
# Dependencies before the code: a change of code then costs seconds.
COPY pyproject.toml ./
RUN --mount=type=secret,id=pip_config,target=/etc/pip.conf \
    mkdir -p hcodec_core operators/hcodec_airflow \
    && touch README.md LICENSE NOTICE \
    && /opt/hcodec/bin/pip install --constraint constraints.txt ".[worker]" \
    && /opt/hcodec/bin/pip uninstall --yes hcodec-pipelines
COPY README.md LICENSE NOTICE ./
COPY hcodec_core ./hcodec_core
COPY operators ./operators
RUN --mount=type=secret,id=pip_config,target=/etc/pip.conf \
    /opt/hcodec/bin/pip install --no-deps . \
    && rm -r /opt/hcodec/lib/python3*/site-packages/hcodec_airflow \
    && /opt/hcodec/bin/pip check \
    && /opt/hcodec/bin/python -c "import hcodec_core.inference.worker" \
    && ! /opt/hcodec/bin/python -c "import airflow" 2>/dev/null
COPY docker/check_weights.py ./
COPY --from=weights / /weights/
RUN rm -f /weights/LICENSE && /opt/hcodec/bin/python check_weights.py /weights

FROM system AS runtime
RUN groupadd --system --gid 10001 hcodec \
    && useradd --system --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin hcodec
COPY --from=build /opt/hcodec /opt/hcodec
COPY --from=build /weights /weights
# Nothing is fetched at run time, and nothing is written but to /tmp and the folder of --scratch (emptyDirs in a pod).
ENV PATH=/opt/hcodec/bin:$PATH \
    HOME=/tmp \
    HF_HOME=/tmp/huggingface \
    HF_HUB_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TRANSFORMERS_OFFLINE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
# Last, since they change with every commit.
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hcodec-worker" \
      org.opencontainers.image.description="Encodes audio into tokens: hcodec run JOB_URI" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# hcodec is process 1: it takes SIGTERM itself (leases are released, exit code 143) and waits for its own children.
STOPSIGNAL SIGTERM
ENTRYPOINT ["hcodec"]
CMD ["--help"]
