#!/usr/bin/env bash
# A real SLURM of one machine on loopback, for tests: slurm_lab.sh install|start|stop. Debian or Ubuntu, as root.
# NODES=3: the machine plays three nodes.
# No systemd, no cgroups, nothing outside of $LAB but the packages and /etc/munge/munge.key.
set -euo pipefail
LAB=${LAB:-/tmp/rsotrain-slurm}
NODES=${NODES:-1}
export SLURM_CONF=$LAB/slurm.conf

install() {
  command -v slurmctld slurmd munged sbatch >/dev/null && return
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge >/dev/null
}

configure() {
  local host
  host=$(hostname -s)
  mkdir -p "$LAB"/{state,spool,log,munge}
  chmod 755 "$LAB" "$LAB/munge"
  # KillWait: how long a run has for its checkpoint after SIGTERM. cred_expire: a requeued job starts only
  # when its old credential has expired.
  cat >"$SLURM_CONF" <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16827
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=$LAB/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=60
MinJobAge=3600
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/slurmctld.pid
SlurmdPidFile=$LAB/slurmd.%n.pid
SlurmctldLogFile=$LAB/log/slurmctld
SlurmdLogFile=$LAB/log/slurmd.%n
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  for n in $(seq "$NODES"); do
    mkdir -p "$LAB/spool/n$n"
    echo "NodeName=n$n NodeHostname=$host NodeAddr=127.0.0.1 Port=$((17010 + n)) CPUs=${CPUS:-4}" \
      "RealMemory=2000 State=UNKNOWN" >>"$SLURM_CONF"
  done
}

start() {
  configure
  [ -s /etc/munge/munge.key ] || mungekey -c
  chown -R munge:munge "$LAB/munge"
  setpriv --reuid=munge --regid=munge --clear-groups munged --socket="$LAB/munge/socket" \
    --pid-file="$LAB/munge/pid" --log-file="$LAB/munge/log" --seed-file="$LAB/munge/seed"
  slurmctld -f "$SLURM_CONF"
  for n in $(seq "$NODES"); do slurmd -f "$SLURM_CONF" -N "n$n"; done
  for _ in $(seq 150); do
    [ "$(timeout 3 sinfo -h -t idle -o %D 2>/dev/null)" = "$NODES" ] && return
    sleep 0.2
  done
  echo "slurm_lab.sh: the nodes did not come up" >&2
  tail -n 5 "$LAB"/log/* >&2
  return 1
}

stop() {
  local file pid
  for file in "$LAB"/slurmd.*.pid "$LAB"/slurmctld.pid "$LAB"/munge/pid; do
    [ -f "$file" ] || continue
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 100); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
  done
  rm -rf "$LAB"
}

"$@"
