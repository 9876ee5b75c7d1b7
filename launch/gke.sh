#!/usr/bin/env bash
# Train on Kubernetes: a TPU slice of a GKE cluster through xpk, or an indexed job of GPU nodes on any cluster through
# kubectl. The flags are those of diffjax.cli.train. What ends with code 75 or is lost is started again, an error (1) or a
# mistake (2) is not; the same command goes on later. Not run on a cluster by us yet.
#
#   bash launch/gke.sh --cluster=NAME --tpu_type=v5litepod-16 --storage=runs --config=configs/edm/cifar10_ddpmpp.py \
#     --workdir=/runs/cifar10 --dry_run
#   bash launch/gke.sh --image=IMAGE --nodes=4 --gpus=8 --claim=runs --config=... --workdir=/runs/cifar10 --dry_run
#
# Pods lose their disk: --workdir lies on a volume that all of them mount, or --config.train.checkpoint_folder names a
# bucket (only the checkpoints then outlive the pods). --name=NAME (diffjax). --retries=K (20): starts again at most.
# xpk, of a cluster that xpk made: --storage=NAME of `xpk storage list`, mounted where it says. The committed checkout
# is put on top of an image of Python; project and zone are those of gcloud's configuration.
# kubectl: --image has this checkout as its working folder and diffjax[cuda] installed; --claim is a
# PersistentVolumeClaim that many pods may write (ReadWriteMany), mounted at /runs. --dry_run prints the job, or the
# commands, and ends.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

own="name retries cluster tpu_type storage image nodes gpus claim"
name=diffjax retries=20 cluster='' tpu_type='' storage='' image='' nodes=1 gpus=8 claim=''
read_arguments "$@"
matches name '[a-z][-a-z0-9]{0,37}[a-z0-9]' diffjax
whole retries 0
shared_folder --workdir=/runs/NAME

on_tpu() {
  local processes=gke storages=() checkout=.cache/gke/$name
  matches cluster '[a-z][-a-z0-9]{0,37}[a-z0-9]' training
  tpu_hosts --tpu_type "$tpu_type"
  [ "$hosts" != 1 ] || processes=one
  [ -z "$storage" ] || storages=("--storage=$storage")
  if [ "$dry_run" = no ]; then
    command -v xpk >/dev/null || fail "found no xpk: type python -m pip install xpk, or leave --tpu_type out for GPUs"
    committed "the cluster"
  fi
  act rm -rf "$checkout"
  act mkdir -p "$checkout"
  act git archive --format=tar "--output=$checkout.tar" HEAD
  act tar -xf "$checkout.tar" -C "$checkout"
  act xpk workload create "--workload=$name" "--cluster=$cluster" "--tpu-type=$tpu_type" "--base-docker-image=python:3.12" \
    "--script-dir=$checkout" "--max-restarts=$retries" --restart-on-exit-codes=75 --termination-grace-period-seconds=300 \
    ${storages[@]+"${storages[@]}"} \
    "--command=source launch/_env.sh && prepare $(with_bucket demo,tpu) && exec python -m diffjax.cli.train --processes=$processes$arguments"
  echo "look at it with: xpk workload list --cluster=$cluster; end it with: xpk workload delete --workload=$name --cluster=$cluster"
}

quoted() { # text as a string of JSON, which YAML reads
  local text=${1//\\/\\\\}
  echo "\"${text//\"/\\\"}\""
}

indexed_job() {
  local command='' word mounts='' volumes=''
  for word in "${words[@]}"; do
    command+="
        - $(quoted "$word")"
  done
  if [ -n "$claim" ]; then
    mounts="
        - name: runs
          mountPath: /runs"
    volumes="
      - name: runs
        persistentVolumeClaim:
          claimName: $claim"
  fi
  echo "apiVersion: v1
kind: Service
metadata:
  name: $name
spec:
  clusterIP: None
  publishNotReadyAddresses: true # a pod is found before it is ready
  selector:
    batch.kubernetes.io/job-name: $name
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $name
spec:
  completionMode: Indexed
  completions: $nodes
  parallelism: $nodes
  backoffLimit: $((retries * nodes)) # a lost pod ends the others with code 75, and each of them counts
  podFailurePolicy:
    rules:
    - action: Ignore # taken away by the cluster: does not count
      onPodConditions:
      - type: DisruptionTarget
        status: \"True\"
    - action: FailJob
      onExitCodes:
        containerName: train
        operator: In
        values: [1, 2]
  template:
    spec:
      subdomain: $name
      restartPolicy: Never
      terminationGracePeriodSeconds: 300
      containers:
      - name: train
        image: $(quoted "$image")
        command:$command
        env:
        - name: DIFFJAX_NUM_PROCESSES
          value: \"$nodes\"
        - name: DIFFJAX_SERVICE
          value: $name
        resources:
          limits:
            nvidia.com/gpu: $gpus
        volumeMounts:
        - name: memory
          mountPath: /dev/shm$mounts
      volumes:
      - name: memory # NCCL needs more than the usual 64 MB
        emptyDir:
          medium: Memory$volumes"
}

if [ -n "$tpu_type" ]; then
  on_tpu
  exit 0
fi
[ -n "$image" ] || fail "--tpu_type and --image are missing; for example --tpu_type=v5litepod-16, or --image=IMAGE for GPUs"
whole nodes 1
whole gpus 1
[ -z "$claim" ] || matches claim '[a-z0-9][-a-z0-9.]*' runs
[[ "$workdir" != /runs/* || -n "$claim" ]] || fail "found --workdir=$workdir, but nothing is mounted at /runs: type --claim=NAME"
words=()
eval "words=(python -m diffjax.cli.train --processes=kubernetes$arguments)"
[[ "${words[*]}" != *[[:cntrl:]]* ]] || fail "found a line break or another control character in a flag: leave it out"
job=$(indexed_job)
if [ "$dry_run" = yes ]; then
  echo "$job"
  exit 0
fi
command -v kubectl >/dev/null || fail "found no kubectl: install it, or pipe what --dry_run prints to where it is"
kubectl apply --filename=- <<<"$job"
echo "look at it with: kubectl logs --follow job/$name; end it with: kubectl delete job,service $name"
