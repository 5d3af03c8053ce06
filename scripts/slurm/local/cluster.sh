#!/usr/bin/env bash
# A one-node SLURM on this machine, from Debian's packages: `cluster.sh up DIR`, `cluster.sh down DIR`.
# For tests; it needs root, changes nothing outside DIR but /run/munge, and listens on unusual ports.
set -euo pipefail
action=${1:?up or down} home=$(realpath -m "${2:?folder}")

install() {
    command -v slurmctld slurmd munged >/dev/null && return
    DEBIAN_FRONTEND=noninteractive apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends slurm-wlm munge
}

configure() {
    local name
    name=$(hostname -s)
    mkdir -p "$home"/{state,spool,log}
    cat >"$home/slurm.conf" <<CONF
ClusterName=fp8sync
SlurmctldHost=$name(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd.log
JobRequeue=1
ReturnToService=2
NodeName=$name NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=local Nodes=$name Default=YES MaxTime=60 State=UP OverSubscribe=EXCLUSIVE
CONF
}

up() {
    install
    configure
    if ! munge -n >/dev/null 2>&1; then
        mkdir -p /run/munge && chown munge: /run/munge
        runuser -u munge -- munged --force
        pgrep -u munge -n munged >"$home/munged.pid"
    fi
    export SLURM_CONF=$home/slurm.conf
    slurmctld
    slurmd
    for _ in $(seq 30); do
        sinfo -h -o %T 2>/dev/null | grep -q idle && return
        sleep 1
    done
    tail -n 20 "$home"/log/*.log >&2
    return 1
}

down() {
    export SLURM_CONF=$home/slurm.conf
    scontrol shutdown 2>/dev/null || true
    for name in slurmd slurmctld munged; do
        [[ -s $home/$name.pid ]] || continue
        pid=$(cat "$home/$name.pid")
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null && sleep 0.1; done
    done
}

"$action"
