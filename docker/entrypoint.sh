#!/bin/sh
# Closes what clients have no use for, model control among it, with a key drawn at every start; CONTROL_KEY names one for an operator.
# Anything else than the server is started as it is.
set -eu
if [ "${1:-}" = tritonserver ]; then
    key=${CONTROL_KEY:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
    closed="model-repository,shared-memory,trace,logging:missrec-control=$key"
    set -- "$@" "--http-restricted-api=$closed" "--grpc-restricted-protocol=$closed"
fi
exec "$@"
