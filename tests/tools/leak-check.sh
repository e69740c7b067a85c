#!/bin/bash
# leak-check.sh snapshot FILE: writes down what the host has of mounts, loop devices, network devices, nftables
# tables, named network namespaces and processes of lazyrun and of the test servers.
# leak-check.sh compare FILE: fails and says what is there now that was not in FILE.
set -eu
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

list() {
  # The mount point and type; ids change.
  awk '{ for (i = 7; i <= NF; i++) if ($i == "-") { print "mount " $5 " " $(i + 1); break } }' /proc/self/mountinfo
  for file in /sys/block/loop*/loop/backing_file; do
    [ -e "$file" ] && echo "loop device $(cat "$file")"
  done
  for device in /sys/class/net/*; do echo "network device ${device##*/}"; done
  command -v nft >/dev/null && nft list tables 2>/dev/null | sed 's/^/nftables /'
  for name in /run/netns/*; do [ -e "$name" ] && echo "network namespace $name"; done
  # By comm, which never blocks: cmdline and exe of a process that hangs in exec or in a fault do.
  for dir in /proc/[0-9]*; do
    name=$(cat "$dir/comm" 2>/dev/null) || continue
    case $name in
    lazyrun* | exe | memfd:* | containerd* | docker-registry) echo "process $name ${dir#/proc/}" ;;
    esac
  done
  for dir in /run/lazyrun/*; do [ -e "$dir" ] && echo "run directory $dir"; done
  # The parent group stays, as docker's does: it is empty, and removing it would race with a container that starts.
  find /sys/fs/cgroup -type d \( -path '*/lazyrun*/*' -o -name 'lazyrun-test-*' \) 2>/dev/null | sed 's/^/cgroup /'
  true
}

case ${1:-} in
snapshot)
  list | sort -u >"$2" ;;
compare)
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    # What was told to end may need a moment.
    left=$(list | sort -u | comm -13 "$2" -)
    [ -n "$left" ] || { echo "nothing was left behind"; exit 0; }
    sleep 1
  done
  echo "left behind:" >&2
  echo "$left" >&2
  exit 1 ;;
*)
  echo "usage: leak-check.sh snapshot|compare FILE" >&2
  exit 2 ;;
esac
