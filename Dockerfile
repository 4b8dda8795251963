# Two targets: `cpu` (tiny and small recipes, server, report, tests) and `cuda` (all recipes).
#   docker build --target cpu -t dvpo:cpu .
# Tags here, digests beside them; `python container/pin.py` asks the registry and writes the digests in.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG PYTHON_DIGEST=
ARG CUDA_BUILD_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
ARG CUDA_BUILD_DIGEST=
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-runtime-ubuntu24.04
ARG CUDA_DIGEST=

# ---- packages: rebuilt only when a lock changes
FROM ${PYTHON_IMAGE}${PYTHON_DIGEST:+@${PYTHON_DIGEST}} AS cpu-packages
SHELL ["/bin/sh", "-euc"]
# An index that has torch without CUDA makes the image smaller; the usual one will do.
ARG TORCH_INDEX=
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.lock /tmp/
RUN --mount=type=cache,target=/root/.cache/pip,id=pip-cpu \
    pip install --retries 1 ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$(grep '^torch==' /tmp/requirements.lock)" \
        -c /tmp/requirements.lock
RUN --mount=type=cache,target=/root/.cache/pip,id=pip-cpu pip install -r /tmp/requirements.lock

FROM ${CUDA_BUILD_IMAGE}${CUDA_BUILD_DIGEST:+@${CUDA_BUILD_DIGEST}} AS cuda-packages
SHELL ["/bin/bash", "-o", "pipefail", "-euc"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ ninja-build \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.gpu.lock /tmp/
RUN --mount=type=cache,target=/root/.cache/pip,id=pip-cuda \
    grep -v '^deepspeed==' /tmp/requirements.gpu.lock > /tmp/others.lock \
    && pip install -r /tmp/others.lock
# What ZeRO runs on is compiled here, for A100 and H100; the other ops stay to be compiled at their first use.
RUN --mount=type=cache,target=/root/.cache/pip,id=pip-cuda \
    DS_BUILD_UTILS=1 DS_BUILD_FUSED_ADAM=1 TORCH_CUDA_ARCH_LIST="8.0;9.0" \
    pip install --no-deps --no-build-isolation --no-binary deepspeed "$(grep '^deepspeed==' /tmp/requirements.gpu.lock)"

# ---- code: one copy for both targets
FROM ${PYTHON_IMAGE}${PYTHON_DIGEST:+@${PYTHON_DIGEST}} AS code
WORKDIR /app
COPY . .
ARG COMMIT=
RUN python container/commit.py "$COMMIT" .git > commit \
    && rm -rf .git \
    && python -m compileall -q dvpo server reproduce \
    && mkdir -p /data/models /data/runs /data/artifacts /data/cache \
    && chmod -R 0777 /data

# ---- the scoring server's kernels: compiled here, so that no container needs a compiler
FROM cpu-packages AS kernels
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=code /app /app
WORKDIR /app
RUN DVPO_KERNELS=/opt/kernels python -c "from server.backends.cpu_kernels import compiled; print(compiled())" \
    && chmod -R a+rX /opt/kernels

# ---- cuda
FROM ${CUDA_IMAGE}${CUDA_DIGEST:+@${CUDA_DIGEST}} AS cuda
# g++ and the headers are for kernels that Triton compiles at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev g++ tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 dvpo && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home dvpo
COPY --from=cuda-packages /opt/venv /opt/venv
COPY --from=code /app /app
COPY --from=code /data /data
# hadolint ignore=DL3064
ENV PATH=/opt/venv/bin:$PATH HOME=/data USER=dvpo LOGNAME=dvpo PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/data/models XDG_CACHE_HOME=/data/cache MPLCONFIGDIR=/data/cache/matplotlib \
    TRITON_CACHE_DIR=/data/cache/triton TORCHINDUCTOR_CACHE_DIR=/data/cache/inductor VLLM_CACHE_ROOT=/data/cache/vllm \
    TORCH_EXTENSIONS_DIR=/data/cache/extensions TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=8 \
    NCCL_DEBUG=WARN TORCH_NCCL_ASYNC_ERROR_HANDLING=1
RUN --mount=type=cache,target=/root/.cache/pip,id=pip-cuda pip install --no-deps --no-build-isolation -e /app \
    && python3 /app/container/packages.py > /app/packages.json
WORKDIR /data
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "/app/container/health.py"]
ENTRYPOINT ["tini", "--"]
CMD ["dvpo", "doctor"]
ARG COMMIT=
LABEL org.opencontainers.image.title="dvpo" \
      org.opencontainers.image.description="Decoupled Value Policy Optimization: training, evaluation and the scoring server, with CUDA" \
      org.opencontainers.image.revision="$COMMIT"

# ---- cpu
FROM ${PYTHON_IMAGE}${PYTHON_DIGEST:+@${PYTHON_DIGEST}} AS cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 dvpo && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home dvpo
COPY --from=cpu-packages /opt/venv /opt/venv
COPY --from=kernels /opt/kernels /opt/kernels
COPY --from=code /app /app
COPY --from=code /data /data
# hadolint ignore=DL3064
ENV PATH=/opt/venv/bin:$PATH HOME=/data USER=dvpo LOGNAME=dvpo PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/data/models XDG_CACHE_HOME=/data/cache MPLCONFIGDIR=/data/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/data/cache/inductor TOKENIZERS_PARALLELISM=false DVPO_KERNELS=/opt/kernels
RUN --mount=type=cache,target=/root/.cache/pip,id=pip-cpu pip install --no-deps --no-build-isolation -e /app \
    && python /app/container/packages.py > /app/packages.json
WORKDIR /data
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "/app/container/health.py"]
ENTRYPOINT ["tini", "--"]
CMD ["dvpo", "doctor"]
ARG COMMIT=
LABEL org.opencontainers.image.title="dvpo" \
      org.opencontainers.image.description="Decoupled Value Policy Optimization: training, evaluation and the scoring server" \
      org.opencontainers.image.revision="$COMMIT"
