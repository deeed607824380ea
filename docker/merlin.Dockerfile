# ETL, training and export: NVIDIA's Merlin image for PyTorch (Python 3.10, pandas 1.5, RAPIDS, torch for CUDA) + this package.
ARG MERLIN_IMAGE=nvcr.io/nvidia/merlin/merlin-pytorch:23.12
FROM ${MERLIN_IMAGE}

# What the image lacks, without moving what it is built around.
RUN python3 -m pip list --format=freeze | grep -E '^(numpy|pandas|pyarrow|torch|dask|distributed|cudf|numba|protobuf)==' > /tmp/image.txt \
 && python3 -m pip install --no-cache-dir -c /tmp/image.txt "safetensors>=0.4" "typer>=0.12" "rich>=13" "pyyaml>=6" "scikit-learn>=1.3" "pillow>=10"

COPY . /opt/missrec-t4r
RUN python3 -m pip install --no-cache-dir --no-deps /opt/missrec-t4r && missrec --help > /dev/null

ENV TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=2000
WORKDIR /output
CMD ["missrec", "--help"]
