# Runs wavedistill, on a GPU where there is one:
#   docker build -t wavedistill .
#   mkdir -p data exp
#   docker run --gpus all --user "$(id -u):$(id -g)" -v ./data:/workspace/data -v ./exp:/workspace/exp \
#     wavedistill run demo
# or, with the same folders, `docker compose run wavedistill run demo` (compose.yaml).
# torch's wheels bring CUDA; a GPU needs the NVIDIA driver and its container toolkit on the host.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

# A compiler: the PESQ score is built from source, and torch.compile and Triton build at run time.
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace

# The versions that the tests were run with.
ARG TORCH=2.14.1
ARG TORCHAUDIO=2.11.0
RUN pip install --no-cache-dir "torch==${TORCH}" "torchaudio==${TORCHAUDIO}"

# Dependencies first, in a layer that a change of the code does not touch: an empty package stands in for it.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir wavedistill recipes && touch wavedistill/__init__.py recipes/none.toml \
 && pip install --no-cache-dir ".[demo,onnx]" \
 && pip uninstall -y wavedistill \
 && rm -r wavedistill recipes

COPY wavedistill ./wavedistill
COPY recipes ./recipes
RUN pip install --no-cache-dir --no-deps .

# Any user may compile and write here: --user may name one that the image does not know.
RUN mkdir -m 1777 -p /cache /home/anybody data exp
ENV HOME=/home/anybody USER=anybody \
    XDG_CACHE_HOME=/cache NUMBA_CACHE_DIR=/cache/numba MPLCONFIGDIR=/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor TRITON_CACHE_DIR=/cache/triton \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001

# Recordings come in here, experiments stay out there.
VOLUME ["/workspace/data", "/workspace/exp"]
HEALTHCHECK --interval=1h --timeout=5m CMD ["wavedistill", "doctor"]
ENTRYPOINT ["wavedistill"]
CMD ["--help"]
