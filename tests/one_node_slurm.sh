#!/usr/bin/env bash
# One machine as a SLURM of one node, for the test of profiles/slurm (`make test-slurm`):
#
#   apt-get install slurm-wlm munge
#   tests/one_node_slurm.sh start      munged, slurmctld and slurmd, as root, without accounting
#   tests/one_node_slurm.sh stop       ends them and their jobs, and removes what `start` made
#
# For machines on which no SLURM is set up. The configuration stands in /etc/slurm, the one place where
# jobs look for it, since they do not inherit SLURM_CONF; all else is below WORK, with a munge key of
# its own beside the system's.
set -euo pipefail

WORK=/tmp/dsv-one-node-slurm
CONF=/etc/slurm/slurm.conf
CGROUP=/etc/slurm/cgroup.conf
MARK="# made by one_node_slurm.sh, which removes it"

die() {
  echo "one_node_slurm.sh: $1" >&2
  exit 1
}

start() {
  [ "$(id -u)" = 0 ] || die "expected root, whom slurmd runs as"
  local program host cores memory
  for program in munged slurmctld slurmd; do
    command -v "$program" >/dev/null || die "no $program here; apt-get install slurm-wlm munge"
  done
  [ ! -e "$CONF" ] && [ ! -e "$CGROUP" ] || die "expected no SLURM here, found one in ${CONF%/*}"
  host=$(hostname -s)
  cores=$(getconf _NPROCESSORS_ONLN) # nproc would heed OMP_NUM_THREADS
  memory=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)

  mkdir -p "${CONF%/*}"
  mkdir "$WORK" "$WORK"/{munge,state,spool}
  trap failed ERR
  chmod 700 "$WORK/munge"
  (umask 077 && head -c 1024 /dev/urandom >"$WORK/munge/key")
  cat >"$CONF" <<CONFIGURATION
$MARK
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthInfo=socket=$WORK/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
KillWait=5
StateSaveLocation=$WORK/state
SlurmdSpoolDir=$WORK/spool
SlurmctldPidFile=$WORK/slurmctld.pid
SlurmdPidFile=$WORK/slurmd.pid
SlurmctldLogFile=$WORK/slurmctld.log
SlurmdLogFile=$WORK/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cores RealMemory=$memory
PartitionName=one Nodes=$host Default=YES State=UP
CONFIGURATION
  # From 23.02 on slurmd wants control groups unless it is told not to; before, the word is an error.
  case "$(slurmd -V)" in
    *" 2"[0-2].*) ;;
    *) printf '%s\nCgroupPlugin=disabled\n' "$MARK" >"$CGROUP" ;;
  esac

  munged --socket="$WORK/socket" --key-file="$WORK/munge/key" --pid-file="$WORK/munge/pid" \
    --seed-file="$WORK/munge/seed" --log-file="$WORK/munge/log"
  slurmctld
  slurmd
  for _ in {1..60}; do
    if [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ]; then
      echo "SLURM of one node: $host, $cores cores, $memory MiB"
      return
    fi
    sleep 0.5
  done
  false
}

failed() {
  grep -hE 'error|fatal' "$WORK"/*.log "$WORK/munge/log" >&2 || true
  stop
  die "the node did not come up; what its daemons said is above"
}

stop() {
  local file pids=()
  for file in "$WORK"/{slurmd.pid,slurmctld.pid,munge/pid}; do
    [ ! -s "$file" ] || pids+=("$(<"$file")")
  done
  if [ ${#pids[@]} = 3 ]; then # jobs would outlive the daemons
    scancel --user="$(id -un)" || true
    for _ in {1..40}; do
      [ -n "$(squeue --noheader 2>/dev/null)" ] || break
      sleep 0.5
    done
  fi
  if [ ${#pids[@]} != 0 ]; then
    kill "${pids[@]}" 2>/dev/null || true
    for _ in {1..40}; do
      kill -0 "${pids[@]}" 2>/dev/null || break
      sleep 0.5
    done
  fi
  for file in "$CONF" "$CGROUP"; do
    ! grep -qsxF "$MARK" "$file" || rm "$file"
  done
  rm -rf "$WORK"
}

case "${1:-}" in
  start | stop) "$1" ;;
  *) die "expected start or stop, got '${1:-}'" ;;
esac
