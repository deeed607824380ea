# ETL, training and export: a plain Python and the pins of `make install` (set B), so that the image is the environment of the tests.
# torch comes from PyPI and carries CUDA. With cuDF, for an ETL on the GPU:  --build-arg RAPIDS=1
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}
ENV TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=2000 DASK_DATAFRAME__QUERY_PLANNING=False

# The steps of `make install`; a change of the package alone does not repeat them.
COPY requirements /opt/missrec-t4r/requirements
RUN python3 /opt/missrec-t4r/requirements/check_platform.py \
 && python3 -m pip install --no-cache-dir -r /opt/missrec-t4r/requirements/set-b.txt
RUN python3 -m pip install --no-cache-dir --no-deps -r /opt/missrec-t4r/requirements/merlin-b.txt

ARG RAPIDS=
RUN if [ -n "${RAPIDS}" ]; then python3 -m pip install --no-cache-dir -r /opt/missrec-t4r/requirements/gpu.txt; fi

COPY . /opt/missrec-t4r
RUN python3 -m pip install --no-cache-dir --no-deps --no-build-isolation /opt/missrec-t4r && missrec --help > /dev/null

WORKDIR /output
CMD ["missrec", "--help"]
