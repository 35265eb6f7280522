#!/usr/bin/env bash
# On a spot instance of AWS: when the notice comes that it will be taken away, two minutes before, Ray is told. Then
# nothing is placed on the node any more, and its actors hand in what they can. deploy/cluster.yaml starts it on each
# worker; on other machines it ends at once, because nobody there gives such notices.
#
#   RAY_AUTH_MODE=token deploy/spot_notice.sh
set -euo pipefail

metadata=${METADATA_URL:-http://169.254.169.254}/latest
every_s=5
answer_s=2
notice_s=110 # of the two minutes, after the notice was seen

main() {
    command -v ray >/dev/null || { echo "error: there is no ray on PATH" >&2; exit 1; }
    exec 9>"${XDG_RUNTIME_DIR:-/tmp}/unmask-spot-notice-$UID"
    flock --nonblock 9 || { echo "another one watches already"; exit 0; }
    token >/dev/null || { echo "no metadata service answers at $metadata: no notices come here"; exit 0; }
    until notice=$(ask "$(token || true)"); do
        sleep "$every_s" 9>&-
    done
    echo "notice: $notice"
    ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "AWS takes the spot instance away" \
        --deadline-remaining-seconds "$notice_s"
}

token() {
    curl --silent --fail --max-time "$answer_s" --request PUT --header "X-aws-ec2-metadata-token-ttl-seconds: 60" \
        "$metadata/api/token"
}

ask() { # TOKEN; fails as long as there is no notice
    curl --silent --fail --max-time "$answer_s" --header "X-aws-ec2-metadata-token: $1" \
        "$metadata/meta-data/spot/instance-action"
}

main
