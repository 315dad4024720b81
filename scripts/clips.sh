#!/bin/sh
# Fetches the real videos that the tests of decoders read: nine clips out of UCF101, HMDB51 and Kinetics, as the Debian source
# package of torchvision carries them, from where this system's apt gets its packages. Does nothing where they are there.
#   scripts/clips.sh [FOLDER]     default: ~/.cache/fasttrain/clips
set -eu
folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/fasttrain/clips}
package=pytorch-vision version=0.14.1
tar_sum=ced67e1cf1f97e168cdf271851a4d0b6d382ab7936e7bcbb39aaa87239c324b6

say() { printf 'fasttrain: %s\n' "$*"; }
fail() { say "$*" >&2; exit 1; }

# right FOLDER: whether all clips are in it, as they were published
right() {
    [ -d "$1" ] && (cd "$1" && sha256sum -c --status - 2>/dev/null) <<SUMS
dba2d9134b7614ddfbafae088bc54d4f1cd1eea528914ba4b5143e69cae6db1b  R6llTwEh07w.mp4
6a617ed6622abab8e3e975da8e450d4f804a32775ee74448f9db0bac76411ef2  RATRACE_wave_f_nm_np1_fr_goo_37.avi
d2dc17d708b367ddec88e7cbf8d432a2aab47c886df931db21b27fba90e1926f  SOX5yA1l24A.mp4
d689e38790330971024d78de01d072952c38501610270699966b3b5c4d894353  SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi
aef6e317bd5011dc0b226c9ee93909971dd598b5629772eb8dce4d3667c6a80f  TrumanShow_wave_f_nm_np1_fr_med_26.avi
e6051b507d489e55cd8076c3c5fbeac5a33569ab0c2f8b8a0d8325ee2490f823  WUzgd7C1pWA.mp4
a72e13832c21410af90e6ba2246da9427f463fd13588db9be32a12a2275b8f36  hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi
e1d577a0b1590e3885d1117950a90adfe4849f222eafcc3aea73683e602dc26a  v_SoccerJuggling_g23_c01.avi
8c3fe073243fbf43553196b27016e66006e69e1fcc68cd926affdc083152ba46  v_SoccerJuggling_g24_c01.avi
SUMS
}

right "$folder" && exit 0
command -v apt-get >/dev/null 2>&1 || fail "the clips come from a Debian source package, and there is no apt-get here"
mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

# apt's own sources, of which only the source packages are listed, in lists of our own: no rights are needed, nothing changes
mkdir -p "$work/parts" "$work/lists/partial" "$work/tar"
for source in /etc/apt/sources.list.d/*.sources; do
    [ -f "$source" ] && sed 's/^Types:.*/Types: deb-src/' "$source" >"$work/parts/${source##*/}"
done
for source in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    [ -f "$source" ] && sed -n 's/^deb[[:space:]]/deb-src /p' "$source" >"$work/parts/${source##*/}"
done
[ ! -f "$work/parts/sources.list" ] || mv "$work/parts/sources.list" "$work/parts/main.list"

apt() {
    apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/parts" -o Dir::State::lists="$work/lists" \
        -o Dir::Cache::srcpkgcache= -o Dir::Cache::pkgcache= -o APT::Sandbox::User=root "$@" >>"$work/log" 2>&1
}

say "fetching $package $version (9 MB) for its clips"
apt update || true # a source without source packages is no matter
(cd "$work/tar" && apt source --download-only --tar-only "$package") || { tail -n 5 "$work/log" >&2; fail "apt could not fetch the source package $package"; }
tar="$work/tar/${package}_$version.orig.tar.gz"
printf '%s  %s\n' "$tar_sum" "$tar" | sha256sum -c --status 2>/dev/null || fail "apt has not $package $version as it was published, but: $(ls "$work/tar")"
tar -xzf "$tar" -C "$work/tar" --strip-components=4 "vision-$version/test/assets/videos"
right "$work/tar" || fail "the clips in $package $version are not those that were expected"
mv "$work"/tar/*.avi "$work"/tar/*.mp4 "$folder/"
right "$folder" || fail "could not put the clips into $folder"
