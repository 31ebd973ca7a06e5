#!/bin/sh
# Runs as the first process of new namespaces and becomes a container's: see container.py, which calls it.
#   container.sh IMAGE FOLDER UID:GID [VARIABLE=VALUE...] COMMAND...
# IMAGE is the image's root, FOLDER one of the container, and in it the file `mounts` what is mounted where: lines of
# "tmpfs - PATH" and "bind SOURCE PATH". WORKDIR is where the command starts.
set -eu
image=$1 folder=$2 user=$3
shift 3

# Places for mounts are made in a layer of memory, so that the image stays what it is.
mount --make-rprivate /
mkdir "$folder/layers"
mount -t tmpfs tmpfs "$folder/layers"
mkdir "$folder/layers/upper" "$folder/layers/work" "$folder/layers/root"
root=$folder/layers/root
mount -t overlay -o "lowerdir=$image,upperdir=$folder/layers/upper,workdir=$folder/layers/work" overlay "$root"

ip link set lo up
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom; do
  : >"$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s /proc/self/fd "$root/dev/fd"
while read -r kind source path; do
  if [ "$kind" = tmpfs ]; then
    mkdir -p "$root$path"
    mount -t tmpfs -o mode=1777,nosuid,nodev,noexec tmpfs "$root$path"
  else
    if [ -d "$source" ]; then mkdir -p "$root$path"; else mkdir -p "$(dirname "$root$path")" && : >>"$root$path"; fi
    mount --bind "$source" "$root$path"
  fi
done <"$folder/mounts"
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --reuid="${user%:*}" --regid="${user#*:}" --clear-groups \
  --no-new-privs --inh-caps=-all --bounding-set=-all env -i --chdir="$WORKDIR" "$@"
