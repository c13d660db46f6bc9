#!/bin/sh
# gtl train or gtl tune for a scheduler that may start the same command more than once: goes on with what an earlier
# start left unfinished, or begins.
#
#   again.sh train recipe.yaml --set train.steps=200
#
# Whoever wants it to save and stop sends SIGTERM to the process `gtl`; this one outlives it and hands its status on.
trap : TERM INT

run() {
    gtl "$@" &
    child=$!
    wait "$child"
    status=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ended the waiting, not the command
        wait "$child"
        status=$?
    done
    return "$status"
}

run "$@" --resume
status=$?
# 2 is a mistake of the user's, such as that there is nothing to go on with. Other ones are told once more.
if [ "$status" -eq 2 ]; then
    run "$@"
    status=$?
fi
exit "$status"
