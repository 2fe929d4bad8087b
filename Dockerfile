# Three images from one recipe: cpu (no torch), gpu (needs only the host's driver) and train.
#   docker build --target cpu --tag foldserve:cpu .
# What is installed lies in layers below the code: a change of code installs nothing anew.
# Wheels of your own go before those that pip would fetch (torch without CUDA, a machine without a network):
#   docker build --build-context wheels=FOLDER --target train .

FROM scratch AS wheels

FROM python:3.11-slim-bookworm AS empty
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_PYTHON=/opt/foldserve/bin/python
# The environment has no pip of its own: the base image's pip fills it.
RUN ["python", "-m", "venv", "--without-pip", "/opt/foldserve"]
WORKDIR /src
COPY pyproject.toml constraints.txt deploy/requirements.py ./
RUN ["python", "requirements.py"]

FROM empty AS dependencies-cpu
# The packages' own tests, C++ sources and types, and the runtime's scripts for language models: 40 MB of no use here.
RUN --mount=from=wheels,target=/wheels \
    pip install --find-links /wheels --constraint constraints.txt --requirement cpu.txt --requirement otel.txt \
 && find /opt/foldserve -type d '(' -name tests -o -path '*/onnx/backend/test' -o -path '*/onnxruntime/transformers' ')' \
    -prune -exec rm -r '{}' + \
 && find /opt/foldserve -type f '(' -name '*.pyi' -o -name '*.cc' -o -name '*.h' ')' -delete

FROM empty AS dependencies-gpu
RUN --mount=from=wheels,target=/wheels \
    pip install --find-links /wheels --constraint constraints.txt --requirement gpu.txt --requirement otel.txt \
 && find /opt/foldserve -type d '(' -name tests -o -path '*/onnx/backend/test' -o -path '*/onnxruntime/transformers' ')' \
    -prune -exec rm -r '{}' + \
 && find /opt/foldserve -type f '(' -name '*.pyi' -o -name '*.cc' -o -name '*.h' ')' -delete

FROM dependencies-cpu AS dependencies-train
RUN --mount=from=wheels,target=/wheels \
    pip install --find-links /wheels --constraint constraints.txt --requirement train.txt

FROM empty AS code
RUN ["pip", "install", "--constraint", "constraints.txt", "setuptools"]
COPY README.md LICENSE ./
COPY foldserve foldserve
COPY service service
COPY training training
# A folder of its own, laid over the environment below; --prefix keeps the interpreter's name in the program.
RUN ["pip", "install", "--no-deps", "--no-build-isolation", "--prefix", "/built", "."]

FROM python:3.11-slim-bookworm AS runtime
LABEL org.opencontainers.image.title="foldserve" \
      org.opencontainers.image.description="Serves BatchNorm image classifiers: one image, one answer, whatever its batch" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="python:3.11-slim-bookworm"
ENV PATH=/opt/foldserve/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/state \
    FOLDSERVE_HOST=0.0.0.0 \
    FOLDSERVE_MODELS=/models \
    FOLDSERVE_STATE=/state
# A new volume takes over the owner of the folder that it covers. A number, for Kubernetes' runAsNonRoot cannot read names.
RUN ["python", "-c", "import os; [(os.makedirs(folder), os.chown(folder, 10001, 10001)) for folder in ('/state', '/models', '/runs')]"]
# In every image, for whichever runs first fills a new volume.
COPY --chown=10001:10001 models /models
USER 10001:10001
WORKDIR /
STOPSIGNAL SIGTERM
ENTRYPOINT ["foldserve"]

FROM runtime AS serving
ENV FOLDSERVE_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=4s --start-period=300s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"FOLDSERVE_PORT\"]}/readyz', timeout=3)"]
CMD ["serve"]

FROM runtime AS train
WORKDIR /runs
HEALTHCHECK NONE
COPY --from=dependencies-train /opt/foldserve /opt/foldserve
COPY --from=code /built /opt/foldserve
CMD ["presets"]

FROM serving AS gpu
# For the container toolkit, which lays the driver's libraries and nvidia-smi into the container.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=dependencies-gpu /opt/foldserve /opt/foldserve
COPY --from=code /built /opt/foldserve

FROM serving AS cpu
ENV FOLDSERVE_DEVICE=cpu
COPY --from=dependencies-cpu /opt/foldserve /opt/foldserve
COPY --from=code /built /opt/foldserve
