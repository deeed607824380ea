#!/bin/sh
# Restricts the parts of Triton's API that clients do not need, such as model control, to requests with a key: CONTROL_KEY, or a random one per start.
# HTTP=closed keeps the HTTP endpoint closed: gRPC and metrics only. Any other command is started unchanged.
set -eu
if [ "${1:-}" = tritonserver ]; then
    key=${CONTROL_KEY:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
    closed="model-repository,shared-memory,trace,logging:missrec-control=$key"
    set -- "$@" "--http-restricted-api=$closed" "--grpc-restricted-protocol=$closed"
    case ${HTTP:-open} in
        open) ;;
        closed) set -- "$@" --allow-http=false ;;
        *) echo "HTTP=$HTTP; expected: open or closed." >&2; exit 2 ;;
    esac
fi
exec "$@"
