#!/usr/bin/env bash
# A SLURM of two nodes on this machine, from Debian's packages: `cluster.sh up DIR`, `cluster.sh down DIR`.
#
# Each node is a network namespace with an address, a loopback and a host name of its own: what binds
# 127.0.0.1 on one cannot be reached from the other. For tests; it needs root, and changes nothing outside DIR
# but /run/munge and, until `down`, the two namespaces and their bridge.
set -euo pipefail
action=${1:?up or down} home=$(realpath -m "${2:?folder}")
bridge=fp8sync0 net=10.213.77 nodes=(fp8sync-a fp8sync-b)

install() {
    command -v slurmctld slurmd munged ip >/dev/null && return
    DEBIAN_FRONTEND=noninteractive apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends slurm-wlm munge iproute2
}

configure() {
    local number
    mkdir -p "$home"/{state,spool,log}
    cat >"$home/slurm.conf" <<CONF
ClusterName=fp8sync
SlurmctldHost=$(hostname -s)($net.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool/%n
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/%n.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/%n.log
JobRequeue=1
EnforcePartLimits=ALL
ReturnToService=2
PartitionName=local Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=EXCLUSIVE
CONF
    echo "127.0.0.1 localhost" >"$home/hosts"
    for number in "${!nodes[@]}"; do
        echo "NodeName=${nodes[number]} NodeAddr=$net.$((number + 2)) CPUs=$(nproc) State=UNKNOWN" >>"$home/slurm.conf"
        echo "$net.$((number + 2)) ${nodes[number]}" >>"$home/hosts"
    done
}

join_network() { # NODE ADDRESS
    ip netns add "$1"
    ip link add "$1-o" type veth peer name "$1-i"
    ip link set "$1-o" master "$bridge" up
    ip link set "$1-i" netns "$1" name eth0
    ip -n "$1" address add "$2/24" dev eth0
    ip -n "$1" link set lo up
    ip -n "$1" link set eth0 up
}

up() {
    install
    down
    configure
    if ! munge -n >/dev/null 2>&1; then
        mkdir -p /run/munge && chown munge: /run/munge
        runuser -u munge -- munged --force
        pgrep -u munge -n munged >"$home/munged.pid"
    fi
    ip link add "$bridge" type bridge
    ip address add "$net.1/24" dev "$bridge"
    ip link set "$bridge" up
    export SLURM_CONF=$home/slurm.conf
    slurmctld
    local number
    for number in "${!nodes[@]}"; do
        join_network "${nodes[number]}" "$net.$((number + 2))"
        mkdir -p "$home/spool/${nodes[number]}"
        # nsenter and not `ip netns exec`, which hides the control groups that slurmd asks for.
        nsenter --net="/run/netns/${nodes[number]}" unshare --uts --mount bash -c \
            'hostname "$1" && mount --bind "$2/hosts" /etc/hosts && exec slurmd' - "${nodes[number]}" "$home"
    done
    for _ in $(seq 30); do
        [[ $(sinfo -h -o %D%T 2>/dev/null) == "${#nodes[@]}idle" ]] && return
        sleep 1
    done
    sinfo >&2
    tail -n 20 "$home"/log/*.log >&2
    return 1
}

down() {
    export SLURM_CONF=$home/slurm.conf
    if [[ -e $SLURM_CONF ]]; then scontrol shutdown 2>/dev/null || true; fi
    local pid file node
    for file in "$home"/*.pid; do
        [[ -s $file ]] || continue
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null && sleep 0.1; done
    done
    for node in "${nodes[@]}"; do
        ip netns delete "$node" 2>/dev/null || true
        ip link delete "$node-o" 2>/dev/null || true
    done
    ip link delete "$bridge" 2>/dev/null || true
}

"$action"
