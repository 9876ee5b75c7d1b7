#!/usr/bin/env bash
# Train on a Cloud TPU slice of one host or many, through a queued resource: ask for it, wait, copy the committed
# checkout, train on all its workers, copy the run folder back. The flags are those of diffjax.cli.train; the same command
# again finds the machine and goes on. Needs gcloud, logged in, with a project. Not run on a TPU by us yet.
#
#   TPU_ZONE=us-central1-a bash launch/tpu_pod.sh --config=configs/edm/cifar10_ddpmpp.py --workdir=runs/cifar10 --dry_run
#   TPU_ZONE=us-central2-b TPU_TYPE=v4-32 bash launch/tpu_pod.sh --retries=20 --delete --config=... --workdir=runs/big \
#     --config.train.checkpoint_folder=gs://BUCKET/big
#
# Several hosts share no disk: their checkpoints go to a bucket. --retries=K (0): how often training is started again
# after code 75 or a lost worker, on a new machine where a spot one was taken away. --delete: delete the machine at the
# end, else it costs money until you do. --dry_run prints the commands and ends. Variables: TPU_ZONE (needed), TPU_NAME
# (diffjax), TPU_TYPE (v5litepod-8), TPU_VERSION (the runtime, by default that of the type), TPU_SPOT (1: cheaper, may be
# taken away with its disk: name a bucket).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

own="retries delete" retries=0 delete=no
read_arguments "$@"
whole retries 0
case "$workdir" in
  /* | ../* | */../*) fail "found --workdir=$workdir, expected a folder inside the checkout: type --workdir=runs/NAME" ;;
esac
zone=${TPU_ZONE:-} name=${TPU_NAME:-diffjax} type=${TPU_TYPE:-v5litepod-8}
[ -n "$zone" ] || fail "TPU_ZONE is not set: type TPU_ZONE=us-central1-a bash $0 ..."
tpu_hosts TPU_TYPE "$type"
case "$generation" in
  v5litepod) version=v2-alpha-tpuv5-lite ;;
  v5p) version=v2-alpha-tpuv5 ;;
  v6e) version=v2-alpha-tpuv6e ;;
  *) version=tpu-ubuntu2204-base ;;
esac
version=${TPU_VERSION:-$version}
[ "$hosts" = 1 ] || [ -n "$checkpoints" ] ||
  fail "$type has $hosts hosts, which share no disk: type --config.train.checkpoint_folder=gs://BUCKET/RUN"
[ -z "${TPU_SPOT:-}" ] || [ "$retries" = 0 ] || [ -n "$checkpoints" ] ||
  fail "TPU_SPOT with --retries, but a spot machine's disk goes with it: type --config.train.checkpoint_folder=gs://BUCKET/RUN"
processes=cloud_tpu
[ "$hosts" != 1 ] || processes=one
at=("--zone=$zone" --quiet)
queue=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)
archive=.cache/$name.tar.gz
spot=()
[ -z "${TPU_SPOT:-}" ] || spot=(--spot)

state() {
  "${queue[@]}" describe "$name" "${at[@]}" --format='value(state.state)' 2>/dev/null
}
remote() { # a command on every worker; its exit code is that of the first one that failed
  act "${vm[@]}" ssh "$name" "${at[@]}" --worker=all --command="$1"
}
await() { # a machine, asked for unless it is there
  local now
  if [ "$dry_run" = yes ] || ! state >/dev/null; then
    act "${queue[@]}" create "$name" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version" "${at[@]}" \
      ${spot[@]+"${spot[@]}"}
  fi
  while [ "$dry_run" = no ]; do
    now=$(state) || fail "gcloud does not find $name any more"
    case "$now" in
      ACTIVE) break ;;
      FAILED | SUSPENDED) fail "$name is $now: type ${queue[*]} delete $name ${at[*]} --force, then run this again" ;;
    esac
    echo "$name: $now"
    sleep "${TPU_POLL_SECONDS:-30}"
  done
}
install() {
  act "${vm[@]}" scp "$archive" "$name:diffjax.tar.gz" "${at[@]}" --worker=all
  remote "mkdir -p diffjax && tar -xzf diffjax.tar.gz -C diffjax && sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv"
  # a new machine goes on with what an earlier one left here; one that trains already has newer files
  if [ -d "$workdir" ] && { [ "$dry_run" = yes ] || ! remote "test -d $(printf %q "diffjax/$workdir")"; }; then
    remote "mkdir -p $(printf %q "diffjax/$(dirname "$workdir")")"
    act "${vm[@]}" scp --recurse "$workdir" "$name:diffjax/$(dirname "$workdir")" "${at[@]}" --worker=all
  fi
}

if [ "$dry_run" = no ]; then
  command -v gcloud >/dev/null || fail "found no gcloud: install the Google Cloud SDK, then type gcloud auth login"
  committed "the TPU"
fi
await
[ "$dry_run" = yes ] || mkdir -p .cache
act git archive --format=tar.gz "--output=$archive" HEAD
install
train="cd diffjax && source launch/_env.sh && prepare $(with_bucket demo,tpu) && python -m diffjax.cli.train --processes=$processes$arguments"
for ((left = retries; ; left--)); do
  code=0
  remote "$train" || code=$?
  [[ $left -gt 0 && ($code -eq 75 || $code -gt 128) ]] || break # 255: ssh does not reach the machine
  echo "the training ended with code $code; starts left: $left"
  while [ "$(state || true)" = SUSPENDING ]; do sleep "${TPU_POLL_SECONDS:-30}"; done
  case "$(state || true)" in
    ACTIVE) # the connection broke: what trains there is to save and end first
      own="-f 'diffjax[.]cli'"
      remote "pkill -TERM $own; for s in {1..120}; do pgrep $own >/dev/null || break; sleep 1; done; pkill -KILL $own; true" || true
      ;;
    *)
      act "${queue[@]}" delete "$name" "${at[@]}" --force || true
      await
      install
      ;;
  esac
done
act mkdir -p "$workdir"
collected=0
act "${vm[@]}" scp --recurse "$name:diffjax/$workdir/*" "$workdir" "${at[@]}" --worker=0 || collected=$?
[ "$code" = 0 ] || echo "the training ended with code $code (75: stopped and saved, or a worker was lost); the same command goes on"
if [ "$delete" = yes ] && [ "$collected" = 0 ]; then
  act "${queue[@]}" delete "$name" "${at[@]}" --force
else
  echo "$name costs money until you type: ${queue[*]} delete $name ${at[*]} --force"
fi
exit "$((code ? code : collected))"
