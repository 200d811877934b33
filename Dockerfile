# The trainer in an image. docs/how-to/docker.md has the commands, also for machines without a GPU.
#
# torch's wheels bring CUDA's libraries with them, so the base need only know how to reach the driver.
ARG BASE=nvidia/cuda:12.8.1-base-ubuntu24.04
FROM ${BASE}

# Index to take torch from; empty: PyPI, whose Linux build is the one for CUDA.
ARG TORCH_INDEX=""
# Owner of what a run writes into a folder of the host.
ARG UID=1000

# A compiler: Triton and torch.compile build their launchers at first use. Versions are those of the base.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
RUN python3 -m venv "$VIRTUAL_ENV"

WORKDIR /opt/grpo_fast
COPY pyproject.toml constraints.txt README.md LICENSE ./
# torch goes in first and alone: its build decides what everything else resolves to.
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY kernels kernels
COPY grpo_fast grpo_fast
RUN pip install --no-cache-dir -c constraints.txt .
COPY configs configs

RUN useradd --non-unique --uid "$UID" --create-home grpo && install -d -o grpo /work
USER $UID
# Where the base has another user of this number, its home would be taken.
ENV HOME=/home/grpo
WORKDIR /work
ENTRYPOINT ["python", "-m", "grpo_fast.train"]
