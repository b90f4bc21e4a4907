# What Airflow's components run: its own image with the operators and DAGs of this project, no torch.
#
# BASE_IMAGE  an Airflow image: a user `airflow` whose `pip` installs beside Airflow.
# pip's configuration, if a mirror is needed, is the build secret `pip_config`: it stays out of the image.
ARG BASE_IMAGE=docker.io/apache/airflow:3.3.2-python3.11

FROM ${BASE_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
USER 50000:0
# WORKDIR alone would make a folder of root's.
RUN mkdir /home/airflow/build
WORKDIR /home/airflow/build
COPY --chown=airflow:0 pyproject.toml README.md LICENSE NOTICE ./
COPY --chown=airflow:0 hcodec_core ./hcodec_core
COPY --chown=airflow:0 operators ./operators
RUN --mount=type=secret,id=pip_config,target=/etc/pip.conf,uid=50000 \
    pip wheel --no-deps --wheel-dir /home/airflow/wheels .

FROM ${BASE_IMAGE} AS runtime
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
USER 50000:0
WORKDIR /home/airflow/build
COPY constraints.txt pyproject.toml ./
# Dependencies before the code: a change of code then costs seconds, and a small layer.
RUN --mount=type=secret,id=pip_config,target=/etc/pip.conf,uid=50000 \
    mkdir -p /home/airflow/empty/hcodec_core /home/airflow/empty/operators/hcodec_airflow \
    && cp pyproject.toml /home/airflow/empty/ \
    && touch /home/airflow/empty/README.md /home/airflow/empty/LICENSE /home/airflow/empty/NOTICE \
    && pip install --constraint constraints.txt "/home/airflow/empty[airflow]" psycopg2-binary \
    && pip uninstall --yes hcodec-pipelines \
    && rm -r /home/airflow/empty
COPY --from=build /home/airflow/wheels /home/airflow/wheels
RUN pip install --no-deps --no-index /home/airflow/wheels/*.whl
WORKDIR /opt/airflow
COPY --chown=airflow:0 dags /opt/airflow/dags
# An image that can run neither our provider nor without torch is no image.
RUN airflow providers list --output plain | grep hcodec-pipelines \
    && ! python -c "import torch" 2>/dev/null \
    && python -c "import hcodec_airflow.job_operator, hcodec_airflow.triggers"
# Last, since they change with every commit.
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="hcodec-airflow" \
      org.opencontainers.image.description="Airflow with the operators and DAGs of hcodec-pipelines" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
