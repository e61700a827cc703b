#!/usr/bin/env bash
# The whole experiment as a chain of Slurm jobs, each waiting for those it reads from (afterok):
#     configs/slurm/pipeline.sh run.yaml [any option of 'sparc3 run']
# Run it where there is a network: what the jobs need is fetched here first. Stages that are done are not submitted.
#     SPARC3_MODEL_JOB   options of sbatch for the stages that run the model, for example
#                        "--ntasks-per-node=4 --gpus-per-node=4" together with an overlay that names a strategy; prune,
#                        which runs it where a rise of perplexity is the price, has them too, but as one task
#     SPARC3_SETUP, SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT   see stage.sbatch
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [ -n "${SPARC3_SETUP:-}" ]; then
    # shellcheck disable=SC1090
    source "$SPARC3_SETUP"
fi
config=${1:?give a config, as configs/slurm/pipeline.sh run.yaml}
shift

sparc3 prepare --config "$config" "$@"
export HF_HUB_OFFLINE=1 # for the jobs too: what they need is here, and a node without a network would try for minutes

# Of each stage its verb, "done" or "todo", and its config file, each of them ended by a NUL.
plan=$(mktemp)
trap 'rm -f "$plan"' EXIT
sparc3 run --config "$config" "$@" --plan "$plan"

fail() {
    echo "pipeline.sh: error: $1" >&2
    exit 1
}

submit() { # dependencies, options of sbatch, then the arguments of stage.sbatch
    local after=$1 options=$2
    shift 2
    # shellcheck disable=SC2086
    job=$(sbatch --parsable ${after:+--dependency=afterok$after} $options "$here/stage.sbatch" "$@" | cut -d';' -f1)
    [[ $job =~ ^[0-9]+$ ]] || fail "sbatch gave no number for the job of '$*', but '$job'."
}

attributions=""
last=""
stages=0
while IFS= read -r -d '' verb && IFS= read -r -d '' state && IFS= read -r -d '' file; do
    stages=$((stages + 1))
    case $state in
    done) continue ;;
    todo) ;;
    *) fail "the plan says '$state' of '$file', neither done nor todo." ;;
    esac
    case $verb in
    attribute)
        submit "$last" "${SPARC3_MODEL_JOB:-}" "$verb" --config "$file" # after the prompts are screened, if they are
        attributions+=":$job"
        ;;
    prune)
        submit "$attributions" "${SPARC3_MODEL_JOB:-} --ntasks-per-node=1 --nodes=1" "$verb" --config "$file"
        last=":$job"
        ;;
    evaluate)
        submit "$last" "${SPARC3_MODEL_JOB:-}" "$verb" --config "$file"
        last=":$job"
        ;;
    *) fail "the plan has a stage of an unknown verb, '$verb'." ;;
    esac
    echo "$job $verb $file"
done <"$plan"
[ "$stages" -gt 0 ] || fail "the plan names no stage, so nothing was submitted."

# Every stage is done by then: this gathers results and report.
submit "$last" "--ntasks-per-node=1 --nodes=1" run --config "$config" "$@"
echo "$job run $config"
