# Serving: NVIDIA's Triton image (Ubuntu 24.04, Python 3.12) + torch + this package, which the two Python models of the repository import.
#   CPU variant:  --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
#   GPU variant:  --build-arg TORCH_INDEX_URL=         (PyPI's torch, which carries CUDA)
# Not older than 25.07: docs/security.md.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:26.09-py3
FROM ${TRITON_IMAGE}
ENV OMP_WAIT_POLICY=passive PIP_BREAK_SYSTEM_PACKAGES=1

ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URL=
# numpy below 2, as NVIDIA installs it for its Python backend (and pyarrow that accepts it). Our code runs with numpy 2 as well.
RUN python3 -m pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} "torch==${TORCH_VERSION}" \
 && python3 -m pip install --no-cache-dir "numpy<2" "pyarrow==18.1.0"

COPY . /opt/missrec-t4r
RUN python3 -m pip install --no-cache-dir "numpy<2" "pyarrow==18.1.0" /opt/missrec-t4r \
 && python3 -c "import missrec_t4r.serving.triton.backend, missrec_t4r.retrieval.ranker"

COPY --chmod=755 docker/entrypoint.sh /usr/local/bin/missrec-entrypoint

EXPOSE 8000 8001 8002
USER 1000:1000
ENTRYPOINT ["missrec-entrypoint"]
CMD ["tritonserver", "--model-repository=/output/models", "--disable-auto-complete-config", "--backend-config=python,shm-default-byte-size=16777216"]
