#!/usr/bin/env bash
# Train on rented GPU nodes of any cloud through SkyPilot, as a managed job: nodes that are taken away or break are
# replaced, and the run goes on from its checkpoints; so it does after code 75. An error (1) or a mistake (2) ends the
# job. The flags are those of diffjax.cli.train. Needs `sky`, set up by `sky check`. Not run on a cloud by us yet.
#
#   bash launch/sky.sh --accelerators=H100:8 --nodes=2 --spot --bucket=gs://BUCKET \
#     --config=configs/edm/cifar10_ddpmpp.py --workdir=/runs/cifar10 --dry_run
#
# --bucket is mounted at /runs, where --workdir lies. --nodes=N (1), each with the --accelerators (H100:8). --spot:
# cheaper, may be taken away. --name=NAME (diffjax). --dry_run prints the task and the command, and ends.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

own="name nodes accelerators bucket spot" name=diffjax nodes=1 accelerators=H100:8 bucket='' spot=no
read_arguments "$@"
matches name '[a-z][-a-z0-9]{0,37}[a-z0-9]' diffjax
whole nodes 1
matches accelerators '[A-Za-z][-A-Za-z0-9.]*(:[1-9][0-9]*)?' H100:8
[[ "$accelerators" != tpu* ]] || fail "found --accelerators=$accelerators, expected GPUs: use launch/tpu_pod.sh for a TPU"
matches bucket '[a-z0-9]+://[-A-Za-z0-9._/]+' gs://BUCKET
[[ "$workdir" == /runs/* ]] || fail "found --workdir=$workdir, expected a folder of the bucket: type --workdir=/runs/NAME"
extras=$(with_bucket demo,cuda)
task="name: $name
num_nodes: $nodes
workdir: . # the checkout, to every node
resources:
  accelerators: $accelerators
  use_spot: $([ "$spot" = no ] && echo false || echo true)
  job_recovery:
    max_restarts_on_errors: 0
    recover_on_exit_codes: [75] # stopped and saved, or a process was lost
file_mounts:
  /runs:
    source: $bucket
    mode: MOUNT
setup: |
  [ -d ~/diffjax_env ] || uv venv --seed --python 3.12 ~/diffjax_env
  source ~/diffjax_env/bin/activate && source launch/_env.sh && prepare $extras
run: |
  source ~/diffjax_env/bin/activate && source launch/_env.sh && prepare $extras
  export DIFFJAX_HOSTS=\"\$(paste -sd, - <<<\"\$SKYPILOT_NODE_IPS\")\" DIFFJAX_PROCESS_ID=\"\$SKYPILOT_NODE_RANK\"
  exec python -m diffjax.cli.train --processes=hosts$arguments"
launch=(sky jobs launch --yes "--name=$name" ".cache/$name.sky.yaml")
if [ "$dry_run" = yes ]; then
  echo "$task"
  act "${launch[@]}"
  exit 0
fi
command -v sky >/dev/null || fail "found no sky: type python -m pip install 'skypilot[gcp]' (or aws, ...), then sky check"
mkdir -p .cache
echo "$task" >".cache/$name.sky.yaml"
act "${launch[@]}"
