//! How much memory a device has left.

use std::{
    ffi::c_int,
    fs,
    path::{Path, PathBuf},
};

use libloading::os::unix::Library;
use tch::Device;

/// Where a container sees its limits.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Returns the bytes that this process can still allocate on a device; none where nobody tells.
///
/// On the CPU these are what the kernel calls available, or what the limits of this process's control groups leave if
/// that is less. File caches count as free in both, since they give way. On CUDA they are what the driver calls free,
/// which leaves out what torch has reserved and not given back.
pub fn free_memory(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => {
            let available = field(&fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")? * 1024;
            let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
            Some(group_room(Path::new(CGROUPS), &groups).map_or(available, |room| room.min(available)))
        }
        Device::Cuda(index) => cuda(c_int::try_from(index).ok()?),
        _ => None,
    }
}

/// Returns the least bytes that the limit of any control group on the way to the root leaves. `groups` is the text of
/// /proc/self/cgroup, which shows version 2 as `0::/path` and version 1 as `4:memory:/path`.
fn group_room(root: &Path, groups: &str) -> Option<u64> {
    let room = |line: &str| {
        let (_, line) = line.split_once(':')?;
        let (controllers, path) = line.split_once(':')?;
        let path = path.trim_start_matches('/');
        if controllers.is_empty() {
            return least(root, path, |group| {
                let limit = number(group, "memory.max")?;
                Some(limit.saturating_sub(number(group, "memory.current")?) + cache(group, ""))
            });
        }
        controllers.split(',').any(|name| name == "memory").then_some(())?;
        least(&root.join("memory"), path, |group| {
            let limit = number(group, "memory.limit_in_bytes")?;
            let used = number(group, "memory.usage_in_bytes")?;
            Some(limit.saturating_sub(used).saturating_add(cache(group, "total_")))
        })
    };
    groups.lines().filter_map(room).min()
}

/// Returns the least `room` of the group at `path` and of those above it, up to `root`. In a container the path may be
/// the host's, of which only the root is seen.
fn least(root: &Path, path: &str, room: impl Fn(&Path) -> Option<u64>) -> Option<u64> {
    let group: PathBuf = root.join(path);
    group.ancestors().take_while(|group| group.starts_with(root)).filter_map(room).min()
}

fn cache(group: &Path, prefix: &str) -> u64 {
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    ["inactive_file", "active_file"].iter().filter_map(|name| field(&stat, &format!("{prefix}{name}"))).sum()
}

/// Reads the number that a group's file holds; none also for `max`, which is no limit.
fn number(group: &Path, file: &str) -> Option<u64> {
    fs::read_to_string(group.join(file)).ok()?.trim().parse().ok()
}

/// Returns the number after a name at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_ascii_whitespace);
    lines.find_map(|mut words| (words.next() == Some(name)).then(|| words.next()?.parse().ok()).flatten())
}

/// Asks the CUDA runtime for the free bytes of a device. tch does not bind this, so libtorch's own runtime is asked,
/// which is in the process already.
fn cuda(index: c_int) -> Option<u64> {
    type GetDevice = unsafe extern "C" fn(*mut c_int) -> c_int;
    type SetDevice = unsafe extern "C" fn(c_int) -> c_int;
    type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> c_int;
    let process = Library::this();
    // SAFETY: the signatures are those of the runtime's C interface, stable since its first versions; 0 is success,
    // and every other answer leaves the arguments alone. The thread's device is put back.
    unsafe {
        let get_device = process.get::<GetDevice>(b"cudaGetDevice\0").ok()?;
        let set_device = process.get::<SetDevice>(b"cudaSetDevice\0").ok()?;
        let mem_get_info = process.get::<MemGetInfo>(b"cudaMemGetInfo\0").ok()?;
        let (mut current, mut free, mut total) = (0, 0, 0);
        (get_device(&mut current) == 0 && set_device(index) == 0).then_some(())?;
        let told = mem_get_info(&mut free, &mut total) == 0;
        set_device(current);
        told.then_some(free as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(path: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(path).unwrap();
        for (name, text) in files {
            fs::write(path.join(name), text).unwrap();
        }
    }

    #[test]
    fn this_host_tells() {
        let free = free_memory(Device::Cpu).unwrap();
        assert!((1 << 20..1 << 50).contains(&free), "{free}");
        // Beyond any host's devices, whether or not it has a CUDA runtime.
        assert_eq!(free_memory(Device::Cuda(4096)), None);
    }

    #[test]
    fn the_tightest_group_on_the_way_to_the_root_decides() {
        let root = tempfile::tempdir().unwrap();
        let pod = root.path().join("kubepods/pod7");
        group(&pod, &[("memory.max", "1000\n"), ("memory.current", "900\n")]);
        group(&pod.join("container"), &[("memory.max", "max\n"), ("memory.current", "500\n")]);
        assert_eq!(group_room(root.path(), "0::/kubepods/pod7/container\n"), Some(100));
        group(&pod, &[("memory.stat", "anon 500\ninactive_file 30\nactive_file 10\n")]);
        assert_eq!(group_room(root.path(), "0::/kubepods/pod7/container\n"), Some(140));
        group(&pod.join("container"), &[("memory.max", "520\n")]);
        assert_eq!(group_room(root.path(), "0::/kubepods/pod7/container\n"), Some(20));
        assert_eq!(group_room(root.path(), "0::/elsewhere\n"), None);
        // A container that sees only its own group, at the root, under the host's path.
        group(root.path(), &[("memory.max", "70\n"), ("memory.current", "60\n")]);
        assert_eq!(group_room(root.path(), "0::/elsewhere\n"), Some(10));
    }

    #[test]
    fn version_1_groups_count_too() {
        let root = tempfile::tempdir().unwrap();
        let files = [
            ("memory.limit_in_bytes", "1000"),
            ("memory.usage_in_bytes", "700"),
            ("memory.stat", "total_active_file 50"),
        ];
        group(&root.path().join("memory/docker/x"), &files);
        let groups = "9:name=systemd:/\n4:cpu,memory:/docker/x\n0::/\n";
        assert_eq!(group_room(root.path(), groups), Some(350));
        let unlimited = [("memory.limit_in_bytes", "9223372036854771712")];
        group(&root.path().join("memory/docker/x"), &unlimited);
        assert!(group_room(root.path(), groups).unwrap() > 1 << 60);
    }
}
