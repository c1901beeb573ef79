# The image of docs/cluster/kuberay.yaml, with and without CUDA (no build needs a GPU):
#   docker build -t landmarks:gpu .
#   docker build -t landmarks:cpu --build-arg EXTRAS=s3 --build-arg PIP_EXTRA_INDEX_URL=... .
# PIP_EXTRA_INDEX_URL is PyTorch's index of CPU builds; without it the CPU image carries torch's CUDA libraries too.
#
# Plain Python rather than a CUDA image: torch and cuML bring the CUDA libraries that they were built for as wheels, the
# driver comes from the host. A second CUDA would add gigabytes, and an older nvJitLink in it keeps cuML from loading.
FROM python:3.12-slim

# make: the install steps. gcc, g++: torch.compile builds its kernels' launchers. wget: KubeRay's health probes.
RUN apt-get update && apt-get install -y --no-install-recommends make gcc g++ libc6-dev wget \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 landmarks && install -d -o landmarks -g landmarks /landmarks /venv \
    && echo 'export PATH=/venv/bin:$PATH' > /etc/profile.d/venv.sh
USER landmarks
WORKDIR /landmarks

ARG EXTRAS=gpu,s3
ARG PIP_EXTRA_INDEX_URL
ENV PATH=/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Dependencies first, without the code: a change of code then rebuilds the last two layers alone.
COPY --chown=landmarks Makefile pyproject.toml constraints.txt README.md LICENSE* ./
RUN make install EXTRAS=$EXTRAS VENV=/venv PYTHON=python3.12
COPY --chown=landmarks . .
RUN make install EXTRAS=$EXTRAS VENV=/venv PYTHON=python3.12

# The copy has no git history: `--build-arg COMMIT=$(git rev-parse HEAD)` lets MLflow know the commit.
ARG COMMIT
ENV LANDMARKS_COMMIT=$COMMIT
CMD ["python", "-m", "jobs.demo"]
