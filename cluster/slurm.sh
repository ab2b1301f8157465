#!/usr/bin/env bash
# A Ray cluster within a Slurm job, for one run. Call it where `orchestrator` and `ray` are on the path, with what you
# would say to `orchestrator`; the job's `storage` lies in a file system that the nodes share, and so does your home:
#
#   sbatch cluster/slurm.sh submit /shared/jobs/books.yaml --name books
#   sbatch cluster/slurm.sh resume books --storage /shared/runs     # --take-over: its cluster was lost, just now
#
# Before the time is over the run is paused, with a checkpoint; `resume` in a job of any size lets it go on. A node that
# is lost costs its workers, not the job, unless it is the first: there Ray's head lives. The exit code is 0 if the run
# has succeeded, 101 if it is paused, 100 otherwise.
#SBATCH --job-name=orchestrator
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
set -euo pipefail
umask 077

if [[ $# -lt 2 || ($1 != submit && $1 != resume) ]]; then
  echo "usage: sbatch $0 submit JOB.yaml [OPTIONS] | resume RUN [OPTIONS]" >&2
  exit 2
fi

start_timeout_s=180 # of the head
room_timeout_s=600  # until there is room for the run's first workers
end_timeout_s=90    # Ray's head takes up to 30 s to end
cpus=${SLURM_CPUS_PER_TASK:-1}
gpus=() # with `sbatch --gpus-per-node=8`; Ray sees those that Slurm lets a step see
[[ -z ${SLURM_GPUS_ON_NODE:-} ]] || gpus=(--num-gpus="$SLURM_GPUS_ON_NODE")
port=$((20000 + SLURM_JOB_ID % 10000)) # above the ports of Ray's workers

# The token is in a file of yours alone; its path, not the token, is in the environment of all steps.
private=${ORCHESTRATOR_HOME:-$HOME/.orchestrator}/clusters/slurm-$SLURM_JOB_ID
mkdir -p "$(dirname "$private")"
mkdir -m 0700 "$private"
steps=() watching=

end_cluster() { # what this script has started, and nothing else: nodes stop when the token is gone
  trap - EXIT
  rm -rf "$private"
  [[ -z $watching ]] || kill -TERM "$watching" 2> /dev/null || true
  local step deadline=$((SECONDS + end_timeout_s))
  for step in "${steps[@]}"; do
    while kill -0 "$step" 2> /dev/null && ((SECONDS < deadline)); do sleep 0.2; done
    kill -TERM "$step" 2> /dev/null || true # srun then kills what is left of its step
  done
  for step in "${steps[@]}"; do wait "$step" 2> /dev/null || true; done
}
trap end_cluster EXIT
trap 'exit 100' TERM INT

od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$private/token"
unset RAY_ADDRESS RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$private/token RAY_USAGE_STATS_ENABLED=0

# On each node: Ray's files lie in a directory of yours alone on the node's own disk, and go with it. Ray makes its own
# directory open to all users, hence one around it. Opening the token asks a file system of the network for news.
on_node='
  directory=$(mktemp -d /tmp/orc-XXXXXXXX) || exit 1
  env --unset=RAY_ADDRESS ray start --block --temp-dir="$directory/ray" "$@" &
  ray=$!
  while kill -0 "$ray" 2> /dev/null; do
    { : < "$RAY_AUTH_TOKEN_PATH"; } 2> /dev/null || kill -TERM "$ray"
    sleep 1
  done
  code=0
  wait "$ray" || code=$?
  rm -rf "$directory"
  exit "$code"
'

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${nodes[0]}
head_ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" hostname -I | awk '{print $1}')
address=$head_ip:$port

srun --nodes=1 --ntasks=1 --nodelist="$head_node" --cpus-per-task="$cpus" \
  bash -c "$on_node" ray --head --node-ip-address="$head_ip" --port="$port" --num-cpus="$cpus" \
  "${gpus[@]}" --include-dashboard=false < /dev/null &
steps+=($!)
deadline=$((SECONDS + start_timeout_s))
export RAY_ADDRESS=$address
until orchestrator ls > /dev/null 2>&1; do
  kill -0 "${steps[0]}" 2> /dev/null || { echo "Ray's head has ended on $head_node" >&2; exit 69; }
  ((SECONDS < deadline)) || { echo "Ray's head did not start on $head_node in $start_timeout_s s" >&2; exit 69; }
  sleep 1
done

if ((${#nodes[@]} > 1)); then # a step per node: the end of one is not the end of the others
  for node in "${nodes[@]:1}"; do
    srun --nodes=1 --ntasks=1 --nodelist="$node" --cpus-per-task="$cpus" \
      bash -c "$on_node" ray --address="$address" --num-cpus="$cpus" "${gpus[@]}" < /dev/null &
    steps+=($!)
  done
fi

run=$(orchestrator "$@" --timeout "$room_timeout_s")
trap 'orchestrator pause "$run" || true' USR1
orchestrator status "$run" --watch &
watching=$!
while kill -0 "$watching" 2> /dev/null; do wait "$watching" || true; done # a signal ends `wait`, not what it waits for

case $(orchestrator status "$run" --output json | tr -d ' \n') in
  *'"phase":"succeeded"'*) exit 0 ;;
  *'"phase":"paused"'*) exit 101 ;;
  *) exit 100 ;;
esac
