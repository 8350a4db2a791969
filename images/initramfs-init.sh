#!/bin/busybox sh
# First process: load the modules, open the root through dm-verity, hand over to the root's own init.
# Whatever fails ends the machine: there is no shell to fall back to.
export PATH=/bin:/sbin

fail() {
    echo "cloudfit: initramfs: $1" > /dev/console
    poweroff -f
}

mount -t proc proc /proc || fail "cannot mount /proc"
mount -t sysfs sysfs /sys || fail "cannot mount /sys"
mount -t devtmpfs devtmpfs /dev || fail "cannot mount /dev"

while read -r module; do
    # A driver for a CPU feature that is not there refuses to load; what is really missing shows below.
    insmod "/modules/$module" 2> /dev/null || echo "cloudfit: initramfs: $module not loaded" > /dev/kmsg
done < /modules/order

# Python cannot wait for random numbers, and a CPU without RDRAND has none yet; this read waits until there are.
dd if=/dev/random of=/dev/null bs=1 count=1 2> /dev/null || fail "no random numbers"

verity= state=
for word in $(cat /proc/cmdline); do
    case $word in
        cloudfit.verity=*) verity=${word#cloudfit.verity=} ;;
        cloudfit.state=*) state=${word#cloudfit.state=} ;;
    esac
done
# data blocks, first block of the hash tree, root hash, salt
IFS=, read -r blocks start root salt <<END
$verity
END
[ -n "$salt" ] || fail "the command line has no cloudfit.verity=BLOCKS,START,ROOT,SALT"

# An archive before this one may carry the root: then the disk is another machine's, and nothing of it runs.
disk=/dev/vda
[ ! -b /dev/vda2 ] || disk=/dev/vda2 # behind the partition that UEFI booted from
if [ -f /root.img ]; then
    losetup -r -f /root.img || fail "no loop device for the root that the archive carries"
    disk=/dev/loop0
fi
[ -b $disk ] || fail "no disk $disk"

table="0 $((blocks * 8)) verity 1 $disk $disk 4096 4096 $blocks $start sha256 $root $salt 1 panic_on_corruption"
dmsetup create root --readonly --noudevsync --noudevrules --table "$table" || fail "dm-verity refuses the root"

# Where a cloud has no second disk to give, an ext4 (its magic number shows it) lies behind the root: /dev/dm-1.
# Looked for only if the disk goes so far: dd would count to the place byte by byte on a shorter one, for minutes.
magic=
if [ -n "$state" ] && [ -b /dev/vda ] && [ "$(cat /sys/block/vda/size)" -gt $((state * 2048 + 8)) ]; then
    magic=$(dd if=/dev/vda bs=1 skip=$((state * 1048576 + 1080)) count=2 2> /dev/null)
fi
if [ "$magic" = "$(printf 'S\357')" ]; then
    first=$((state * 2048))
    table="0 $(($(cat /sys/block/vda/size) - first)) linear /dev/vda $first"
    dmsetup create state --noudevsync --noudevrules --table "$table" || fail "no device for the state behind the root"
fi
mount -t erofs -o ro /dev/dm-0 /root || fail "cannot mount the root"
umount /dev /sys /proc
exec switch_root /root /usr/lib/cloudfit/init
