#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# What became of three kernels: run.sh SOURCE WORK, with the source of Linux 6.12.117 unpacked and clean, and a directory
# for what is built. Needs flex, bison, bc, gcc-s390x-linux-gnu, libc6-dev-s390x-cross and qemu-system-s390x; takes ten
# minutes on two CPUs. WORK/as-is.log, bare-continue.log and patched.log have the consoles.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source=$(cd "$1" && pwd)
mkdir -p "$2"
work=$(cd "$2" && pwd)
export ARCH=s390 CROSS_COMPILE=s390x-linux-gnu-

program() {
	"${CROSS_COMPILE}gcc" -std=c11 -O2 -Wall -Wextra -static "${@:3}" -o "$work/$1" "$2"
}
# The kernel can't start its first process with PGSTE page tables.
program init "$here/init.c"
program no-key "$here/no-key.c" -Wl,--s390-pgste
program lost-keys "$here/../lost-keys.c" -Wl,--s390-pgste
gcc -O2 -o "$work/gen_init_cpio" "$source/usr/gen_init_cpio.c"
"$work/gen_init_cpio" - >"$work/initrd" <<END
dir /dev 755 0 0
nod /dev/console 600 0 0 c 5 1
file /init $work/init 755 0 0
file /lost-keys $work/lost-keys 755 0 0
file /no-key $work/no-key 755 0 0
END

mkdir -p "$work/build"
make -C "$source" O="$work/build" -s tinyconfig
cat "$here/config" >>"$work/build/.config"
make -C "$source" O="$work/build" -s olddefconfig
patch -d "$source" -p1 <"$here/emulated.diff"
trap 'patch -R -d "$source" -p1 <"$here/emulated.diff"' EXIT
for kernel in as-is bare-continue patched; do
	case $kernel in
	as-is) change=/dev/null ;;
	bare-continue) change=$here/bare-continue.diff ;;
	patched) change=$here/../lost-keys-6.12.diff ;;
	esac
	patch -d "$source" -p1 <"$change"
	make -C "$source" O="$work/build" -s -j"$(nproc)" bzImage
	patch -R -d "$source" -p1 <"$change"
	# One that never returns is ended.
	timeout 60 qemu-system-s390x -machine s390-ccw-virtio,accel=tcg -cpu max -smp 1 -m 1G -nodefaults -display none \
		-no-reboot -kernel "$work/build/arch/s390/boot/bzImage" -initrd "$work/initrd" \
		-chardev stdio,id=console,signal=off -device sclpconsole,chardev=console \
		</dev/null >"$work/$kernel.log" 2>&1 || true
	echo "== $kernel"
	grep -aE "^  .*(lost|served)|^[SG]ET|ended with|stalls" "$work/$kernel.log"
done
