# Stands for the official Airflow image where no registry can be reached: Airflow for a user `airflow` whose `pip`
# installs beside it. Used by tests only.
ARG BASE_IMAGE=docker.io/library/debian:bookworm-slim

FROM ${BASE_IMAGE}
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    AIRFLOW_HOME=/opt/airflow \
    PATH=/home/airflow/venv/bin:$PATH
RUN useradd --uid 50000 --gid 0 --create-home airflow \
    && mkdir -p /opt/airflow \
    && chown airflow:0 /opt/airflow
USER 50000:0
COPY constraints.txt /tmp/build/constraints.txt
RUN --mount=type=secret,id=pip_config,target=/etc/pip.conf,uid=50000 \
    python3 -m venv /home/airflow/venv \
    && pip install --constraint /tmp/build/constraints.txt apache-airflow
WORKDIR /opt/airflow
ENTRYPOINT ["airflow"]
