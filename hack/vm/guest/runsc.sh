#!/bin/sh
# gVisor as containerd-shim-runc-v2 runs it: Debian does not have containerd-shim-runsc-v1.
# Without a network: on kernel 6.12, Debian's version takes every network namespace for the node's,
# and refuses it. By ptrace: the default platform needs more than an emulated CPU has.
set -- --network=none --platform=ptrace "$@"
case " $* " in
# The shim waits until the output of `start` is closed. The file server that it starts holds it.
*" start "*) exec /usr/bin/runsc "$@" >/dev/null 2>&1 ;;
*) exec /usr/bin/runsc "$@" ;;
esac
