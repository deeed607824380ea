# Serving: NVIDIA's Triton image + torch + this package, which the two Python models of the repository import.
#   CPU variant:  --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
#   GPU variant:  --build-arg TORCH_INDEX_URL=         (PyPI's torch, which carries CUDA)
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:24.10-py3
FROM ${TRITON_IMAGE}
ENV OMP_WAIT_POLICY=passive

ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URL=
# numpy below 2: with 2 the Python backend reads zeros and writes empty tensors, without any error.
RUN python3 -m pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} "torch==${TORCH_VERSION}" \
 && python3 -m pip install --no-cache-dir "numpy<2"

COPY . /opt/missrec-t4r
RUN python3 -m pip install --no-cache-dir "numpy<2" /opt/missrec-t4r \
 && python3 -c "import numpy, missrec_t4r.serving.triton.backend, missrec_t4r.retrieval.ranker; assert numpy.__version__ < '2'"

COPY --chmod=755 docker/entrypoint.sh /usr/local/bin/missrec-entrypoint

EXPOSE 8000 8001 8002
USER 1000:1000
ENTRYPOINT ["missrec-entrypoint"]
CMD ["tritonserver", "--model-repository=/output/models", "--disable-auto-complete-config", "--backend-config=python,shm-default-byte-size=16777216"]
