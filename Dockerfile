# Runs wavedistill on a GPU:
#   docker build -t wavedistill .
#   mkdir -p data exp
#   docker run --gpus all --user "$(id -u):$(id -g)" -v ./data:/workspace/data -v ./exp:/workspace/exp \
#     wavedistill run demo
# The base image brings Python, CUDA, torch and torchaudio; any other of that kind will do.
ARG BASE_IMAGE=pytorch/pytorch:2.7.1-cuda12.8-cudnn9-runtime
FROM ${BASE_IMAGE}

# A compiler, because the PESQ score is built from source.
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace

# Dependencies first, in a layer that a change of the code does not touch: an empty package stands in for it.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir wavedistill recipes && touch wavedistill/__init__.py recipes/none.toml \
 && pip install --no-cache-dir ".[demo]" \
 && pip uninstall -y wavedistill \
 && rm -r wavedistill recipes

COPY wavedistill ./wavedistill
COPY recipes ./recipes
RUN pip install --no-cache-dir --no-deps .

RUN useradd --create-home --uid 10001 wavedistill \
 && mkdir -p data exp \
 && chown -R wavedistill data exp
# Caches that any user may write: --user may name one without a home.
RUN mkdir -m 1777 /cache
ENV NUMBA_CACHE_DIR=/cache/numba MPLCONFIGDIR=/cache/matplotlib
USER wavedistill

# Recordings come in here, experiments stay out there.
VOLUME ["/workspace/data", "/workspace/exp"]
ENTRYPOINT ["wavedistill"]
CMD ["--help"]
