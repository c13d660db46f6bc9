#!/bin/sh
# Waits beside Ray on a spot machine until its cloud says that it goes, and tells Ray: runs save, replicas move.
#
#   notice aws | gcp [URL]
#
# AWS says so two minutes before, by something at this address; Google thirty seconds before, by TRUE.
#   docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
#   cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption
cloud=$1
metadata=${2:-http://169.254.169.254}

has_come() {
    case "$cloud" in
    aws)
        token=$(curl -sf -m 2 -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" "$metadata/latest/api/token") &&
            curl -sf -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" \
                "$metadata/latest/meta-data/spot/instance-action"
        ;;
    gcp) curl -sf -m 2 -H "Metadata-Flavor: Google" "$metadata/computeMetadata/v1/instance/preempted" | grep -qx TRUE ;;
    esac
}

case "$cloud" in
aws) left=100 ;;
gcp) left=25 ;;
*)
    echo "usage: $0 aws|gcp [URL]" >&2
    exit 2
    ;;
esac
until has_come; do sleep 3; done
exec ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the spot machine is taken away" \
    --deadline-remaining-seconds "$left"
