#!/usr/bin/env bash
# SFD in full on CIFAR-10: students of 2 to 5 calls, SFD-v, the second stage.
#
#   bash launch/sfd_cifar10.sh --quick
#       16x16 on a CPU, with a teacher trained here and all baselines, one training seed: one and a half to two hours
#       on 2 cores; writes runs/sfd_cifar10/report.md. Run it again to go on after a stop.
#   bash launch/sfd_cifar10.sh --teacher=FOLDER --vgg=FILE
#       32x32 on GPUs with the published settings: FOLDER is a run of configs/edm/cifar10_ddpmpp.py:uncond, or published
#       weights (python -m diffjax.cli.convert --kind=edm PICKLE FOLDER); FILE torchvision's VGG16 weights for LPIPS in
#       the second stage. Writes runs/sfd_cifar10_full_*.
#   bash launch/sfd_cifar10.sh --smoke   --quick in small, into runs/smoke_sfd_cifar10
#
# CIFAR-10 is read through tensorflow-datasets, prepared as ArrayRecord: from DIFFJAX_DATA, TFDS_DATA_DIR, the folder
# ../shared/data/tensorflow_datasets, or the default folder.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
source "$(dirname "${BASH_SOURCE[0]}")/_sfd.sh"

mode='' teacher_folder='' vgg=''
for argument in "$@"; do
  case "$argument" in
    --quick | --smoke) mode=${argument#--} ;;
    --teacher=*) teacher_folder=${argument#*=} ;;
    --vgg=*) vgg=${argument#*=} ;;
    *) fail "found ${argument@Q}, expected --quick, --smoke, --teacher=FOLDER or --vgg=FILE" ;;
  esac
done

full() {
  [ -f "$teacher_folder/config.json" ] || fail "--teacher=$teacher_folder is no run folder; or type --quick for a CPU"
  [ -f "$vgg" ] || fail "--vgg=$vgg is no file: give torchvision's VGG16 weights"
  prepare demo
  local variant
  for variant in 2 3 4 5 v; do
    run python -m diffjax.cli.train --config=configs/sfd/cifar10.py:$variant --workdir=runs/sfd_cifar10_full_$variant \
      --config.method.teacher="$teacher_folder"
  done
  run python -m diffjax.cli.train --config=configs/sfd/cifar10.py:second --workdir=runs/sfd_cifar10_full_second \
    --config.method.perceptual.backbone="$vgg"
}

quick() {
  local folder data='' base=runs/sfd_cifar10 teacher=() student=() compare=()
  for folder in "${DIFFJAX_DATA:-}" "${TFDS_DATA_DIR:-}" ../shared/data/tensorflow_datasets "$HOME/tensorflow_datasets"; do
    if [ -z "$data" ] && [ -n "$folder" ] && [ -d "$folder/cifar10" ]; then data=$folder; fi
  done
  [ -n "$data" ] || fail "CIFAR-10 is absent: prepare it with tensorflow-datasets (file_format array_record) and set TFDS_DATA_DIR"
  if [ "$mode" = smoke ]; then
    base=runs/smoke_sfd_cifar10
    teacher=(--config.train.total_images=2560 --config.optim.warmup_images=0 --config.model.width=32)
    student=(--config.train.total_images=1280)
    compare=(--config.num_samples=200 --config.batch_size=200 --config.calls="(1, 2)")
  fi
  prepare demo
  run python -m diffjax.cli.train --config=configs/quick/edm_cifar16.py --workdir="$base/teacher" \
    --config.data.data_dir="$data" ${teacher[@]+"${teacher[@]}"}
  students cifar16 "$base" 0 ${student[@]+"${student[@]}"}
  run python -m diffjax.cli.evaluate --config=configs/quick/compare_sfd.py:cifar10 --workdir="$base" \
    --config.base="$base" ${compare[@]+"${compare[@]}"}
  echo
  echo "The report is $base/report.md, with pictures beside it and its figures in $base/report.json."
}

if [ -n "$mode" ]; then quick; else full; fi
