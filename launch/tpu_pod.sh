#!/usr/bin/env bash
# Train on a Cloud TPU through a queued resource: ask for it, wait, copy the committed checkout, train on all its
# workers, copy the run folder back. The flags are those of diffjax.cli.train; the same command again finds the machine
# and goes on. Needs gcloud, logged in, with a project. Not run on a TPU by us yet.
#
#   TPU_ZONE=us-central1-a bash launch/tpu_pod.sh --config=configs/edm/cifar10_ddpmpp.py --workdir=runs/cifar10 --dry_run
#
# --dry_run prints the commands and ends. Variables: TPU_ZONE (needed), TPU_NAME (diffjax), TPU_TYPE (v5litepod-8),
# TPU_VERSION (the runtime, by default that of the type), TPU_SPOT (1: cheaper, may be taken away with its disk: mount a
# bucket and train in it). The machine costs money until it is deleted: the last line says how.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

read_arguments "$@"
case "$workdir" in
  /* | ../* | */../*) fail "found --workdir=$workdir, expected a folder inside the checkout: type --workdir=runs/NAME" ;;
esac
zone=${TPU_ZONE:-} name=${TPU_NAME:-diffjax} type=${TPU_TYPE:-v5litepod-8}
[ -n "$zone" ] || fail "TPU_ZONE is not set: type TPU_ZONE=us-central1-a bash $0 ..."
# single hosts only: training over several processes is not supported yet, and would waste the other hosts
case "$type" in
  v2-8 | v3-8) version=tpu-ubuntu2204-base ;;
  v4-8) version=tpu-ubuntu2204-base ;;
  v5litepod-[148]) version=v2-alpha-tpuv5-lite ;;
  v5p-8) version=v2-alpha-tpuv5 ;;
  v6e-[148]) version=v2-alpha-tpuv6e ;;
  *) fail "found TPU_TYPE=$type, expected one host: v2-8 v3-8 v4-8 v5litepod-{1,4,8} v5p-8 v6e-{1,4,8}" ;;
esac
version=${TPU_VERSION:-$version}
at=("--zone=$zone" --quiet)
queue=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)
archive=.cache/$name.tar.gz
spot=()
[ -z "${TPU_SPOT:-}" ] || spot=(--spot)

show() {
  printf '>'
  printf ' %q' "$@"
  echo
}
act() {
  show "$@"
  [ "$dry_run" = yes ] || "$@"
}
state() {
  "${queue[@]}" describe "$name" "${at[@]}" --format='value(state.state)' 2>/dev/null
}
remote() { # a command on every worker; its exit code is the command's
  act "${vm[@]}" ssh "$name" "${at[@]}" --worker=all --command="$1"
}

if [ "$dry_run" = no ]; then
  command -v gcloud >/dev/null || fail "found no gcloud: install the Google Cloud SDK, then type gcloud auth login"
  [ -z "$(git status --porcelain --untracked-files=no)" ] || fail "found changes that are not committed: the TPU gets the last commit"
fi
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
mkdir -p .cache
act git archive --format=tar.gz "--output=$archive" HEAD
act "${vm[@]}" scp "$archive" "$name:diffjax.tar.gz" "${at[@]}" --worker=all
remote "mkdir -p diffjax && tar -xzf diffjax.tar.gz -C diffjax && sudo apt-get -qq update && sudo apt-get -qq install -y python3.11-venv"
code=0
remote "cd diffjax && source launch/_env.sh && prepare demo,tpu && python -m diffjax.cli.train$arguments" || code=$?
act mkdir -p "$workdir"
act "${vm[@]}" scp --recurse "$name:diffjax/$workdir/*" "$workdir" "${at[@]}" --worker=0
[ "$code" = 0 ] || echo "the training ended with code $code (75: stopped and saved); the same command goes on"
echo "$name costs money until you type: ${queue[*]} delete $name ${at[*]} --force"
exit "$code"
