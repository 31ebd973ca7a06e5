#!/bin/sh
# Runs as the first process of a new pid namespace and becomes its systemd: see sandbox.py, which calls it, twice.
#   boot.sh CGROUP SYSTEMD FOLDER [SHOWN...]
# CGROUP is an empty cgroup for it, FOLDER one that is writable within, SHOWN what else of the machine is to be seen.
set -eu
umask 022
if [ "$1" != - ]; then
  echo 0 >"$1/cgroup.procs" # before the cgroup namespace, whose root it becomes
  shift
  exec unshare --mount --cgroup --ipc --uts -- sh "$0" - "$@"
fi
systemd=$2 folder=$3
shift 3

# The machine's root, under a layer of memory that takes all that is written. Private: it ends with the last process.
mount --make-rprivate /
mount -t tmpfs tmpfs "$folder/root"
mkdir "$folder/root/upper" "$folder/root/work" "$folder/root/merged"
mount -t overlay -o "lowerdir=/,upperdir=$folder/root/upper,workdir=$folder/root/work" overlay "$folder/root/merged"
cd "$folder/root/merged"

mount -t proc proc proc
mount --bind proc/sys proc/sys # what is set there holds for the whole machine
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for memory in run tmp var/tmp var/log dev; do mount -t tmpfs -o mode=755 tmpfs "$memory"; done
chmod 1777 tmp var/tmp
for device in null zero full random urandom tty; do
  : >"dev/$device"
  mount --bind "/dev/$device" "dev/$device"
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for shown in "$@"; do
  mkdir -p ".$shown"
  mount --bind "$shown" ".$shown"
  mount -o remount,bind,ro ".$shown"
done
mkdir -p ".$folder"
mount --bind "$folder" ".$folder"

# Nothing that this machine starts of itself starts here: its disks, timers and servers are its own affair.
rm -rf etc/systemd/system usr/lib/systemd/system/*.wants lib/systemd/system/*.wants \
  usr/lib/systemd/system-generators lib/systemd/system-generators etc/systemd/system-generators
mkdir -p etc/systemd/system/sysinit.target.wants etc/systemd/journald.conf.d
ln -s /usr/lib/systemd/system/systemd-journald.service etc/systemd/system/sysinit.target.wants/
printf '[Journal]\nStorage=volatile\nRateLimitBurst=0\nReadKMsg=no\n' >etc/systemd/journald.conf.d/sandbox.conf
tr -d - </proc/sys/kernel/random/uuid >etc/machine-id # an empty one would make it the first boot, with presets

mkdir old
pivot_root . old
umount -l old
mount --make-rshared / # as systemd finds it: what it mounts for a unit elsewhere, such as credentials, has to come here
: >"$folder/booting"
export container=sandbox PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exec "$systemd" --system --unit=multi-user.target --log-target=journal --show-status=false
