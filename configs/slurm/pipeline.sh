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
config=$1
shift

sparc3 prepare --config "$config" "$@"
export HF_HUB_OFFLINE=1 # for the jobs too: what they need is here, and a node without a network would try for minutes

# Lines of: verb, config file, and "done" or "todo".
plan=$(mktemp)
trap 'rm -f "$plan"' EXIT
sparc3 run --config "$config" "$@" --plan "$plan"

submit() { # dependencies, options of sbatch, then the arguments of stage.sbatch
    local after=$1 options=$2
    shift 2
    # shellcheck disable=SC2086
    sbatch --parsable ${after:+--dependency=afterok$after} $options "$here/stage.sbatch" "$@" | cut -d';' -f1
}

attributions=""
last=""
while read -r verb file state; do
    [ "$state" = todo ] || continue
    case $verb in
    attribute)
        job=$(submit "$last" "${SPARC3_MODEL_JOB:-}" "$verb" --config "$file") # after the prompts are screened, if they are
        attributions+=":$job"
        ;;
    prune)
        job=$(submit "$attributions" "${SPARC3_MODEL_JOB:-} --ntasks-per-node=1 --nodes=1" "$verb" --config "$file")
        last=":$job"
        ;;
    evaluate)
        job=$(submit "$last" "${SPARC3_MODEL_JOB:-}" "$verb" --config "$file")
        last=":$job"
        ;;
    esac
    echo "$job $verb $file"
done <"$plan"

# Every stage is done by then: this gathers results and report.
job=$(submit "$last" "--ntasks-per-node=1 --nodes=1" run --config "$config" "$@")
echo "$job run $config"
