# Sourced by sfd_digits.sh and sfd_cifar10.sh: the students of one training seed, in the order of their dependence.

# students DATA BASE SEED [flags of every training]: configs/quick/{sfd,pd,amed}_DATA.py into BASE/seed_SEED
students() {
  local data=$1 base=$2 seed=$3 folder="$2/seed_$3"
  shift 3
  train() {  # METHOD ARG NAME TEACHER [flags]
    local config="configs/quick/$1_$data.py:$2" name=$3 teacher=$4
    shift 4
    run python -m diffjax.cli.train --config="$config" --workdir="$folder/$name" \
      --config.method.teacher="$teacher" --config.seed="$seed" "$@"
  }
  local calls steps above="$base/teacher"
  for calls in 1 2 3 4 5; do train sfd "$calls" "student_$calls" "$base/teacher" "$@"; done
  train sfd v student_v "$base/teacher" "$@"
  train sfd second second_stage "$folder/student_v" "$@"
  for steps in 16 8 4 2 1; do
    train pd "$steps" "pd_$steps" "$above" "$@"
    above="$folder/pd_$steps"
  done
  for calls in 1 2 3 4 5; do train amed "$calls" "amed_$calls" "$base/teacher" "$@"; done
}
