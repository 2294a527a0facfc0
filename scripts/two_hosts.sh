#!/usr/bin/env bash
# One training on two hosts, played by two network namespaces of this machine with an address each (Linux, as root):
#   scripts/two_hosts.sh teacher=yolov8s.yaml student=yolov8n.yaml data=bccd epochs=1
# All arguments are those of 'yolo_cwd train'. PROCESSES is their number on each host (1), PYTHON the interpreter.
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} GLOO_SOCKET_IFNAME=wire
id=$$

cleanup() {
    trap - EXIT
    kill "${hosts[@]}" 2>/dev/null || true
    wait || true
    ip netns delete "a$id" || true
    ip netns delete "b$id" || true
}
hosts=()
trap cleanup EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

ip netns add "a$id"
ip netns add "b$id"
ip link add wire netns "a$id" type veth peer name wire netns "b$id"
for host in a b; do
    ip -n "$host$id" address add "10.77.0.$([ $host = a ] && echo 1 || echo 2)/24" dev wire
    ip -n "$host$id" link set wire up
    ip -n "$host$id" link set lo up
done

for host in a b; do
    ip netns exec "$host$id" "${PYTHON:-python}" -m torch.distributed.run --nnodes=2 --nproc_per_node="${PROCESSES:-1}" \
        --node_rank="$([ $host = a ] && echo 0 || echo 1)" --master_addr=10.77.0.1 --master_port=29500 \
        -m yolo_cwd train "$@" device=cpu > >(sed -u "s/^/$host: /") 2>&1 &
    hosts+=($!)
done
status=0
for host in "${hosts[@]}"; do
    wait "$host" || status=$?
done
exit $status
