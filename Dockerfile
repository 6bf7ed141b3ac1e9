# A model behind `nvembed serve`, or any other command, in an image of its own.
#
#   docker build -t nvembed .                                         GPUs and CPUs: torch with CUDA (large)
#   docker build -t nvembed --build-arg TORCH_INDEX=ADDRESS .         CPUs alone: PyTorch's index of CPU wheels
#   docker run -p 127.0.0.1:8000:8000 -v ./runs/demo/model:/model:ro nvembed             add --gpus all for GPUs
#
# deploy/compose.yaml runs it with keys, limits and a cache that stays.
ARG PYTHON=3.12-slim-bookworm

FROM python:${PYTHON} AS wheel
WORKDIR /source
COPY . .
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}
ARG TORCH_INDEX=""
ARG EXTRAS=serve,index,mcp,gguf
# The compiler makes the kernels for the CPU that the container starts on (AVX-512), once per cache.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 nvembed \
    && install --directory --owner nvembed --mode 0700 /cache
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.11,<3"
COPY --from=wheel /wheels /wheels
# hadolint ignore=DL3013
RUN wheel="$(ls /wheels/nvembed-*.whl)" && python -m pip install --no-cache-dir "${wheel}[${EXTRAS}]"
USER 10001
ENV NVEMBED_CACHE=/cache HF_HOME=/cache/hub PYTHONUNBUFFERED=1
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=120s --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["nvembed"]
CMD ["serve", "/model", "--host", "0.0.0.0"]
