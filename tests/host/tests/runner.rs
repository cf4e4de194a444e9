// SPDX-License-Identifier: GPL-2.0
//! The runner of the guest tests tells what it did not do: in a tree with the real runner, two tests,
//! and guests that are made up.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What `qemu/machine.sh` says: a guest that runs each test at once, or one whose worker ends as it boots.
const MACHINE: &str = r#"
machine_prepare() { accel=(-accel tcg); }
machine_runs() { [[ -e $work/up ]]; }
machine_stop() { :; }
machine_say() { :; }
machine_hear() { printf -v "$1" %s "result ok 1 go-on 0"; }
machine_boot() {
    [[ ${GUEST-} != dies ]] || exit 3
    mkdir -p "$1"
    touch "$1/console.log" "$1/output.log"
}
"#;

/// A tree for one test, which is gone with it.
struct Tree(PathBuf);

impl Tree {
    fn new(name: &str) -> Self {
        let top = std::env::temp_dir().join(format!("ploop-runner-{}-{name}", std::process::id()));
        let real = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../qemu");
        for dir in ["qemu", "tests/guest", ".build"] {
            fs::create_dir_all(top.join(dir)).unwrap();
        }
        for file in ["test-guest", "lib.sh"] {
            fs::copy(real.join(file), top.join("qemu").join(file)).unwrap();
        }
        fs::write(top.join("qemu/machine.sh"), MACHINE).unwrap();
        let payload = top.join("qemu/payload");
        fs::write(&payload, "#!/bin/sh\ntouch \"$1\"\n").unwrap();
        fs::set_permissions(&payload, fs::Permissions::from_mode(0o755)).unwrap();
        for test in ["one", "two"] {
            let text = "#!/bin/sh\n# SPDX-License-Identifier: GPL-2.0\n# A story.\n";
            fs::write(top.join(format!("tests/guest/{test}.sh")), text).unwrap();
        }
        fs::create_dir(top.join("kernel")).unwrap();
        fs::write(top.join("kernel/abi"), "7.2\n").unwrap();
        Self(top)
    }

    fn run(&self, guest: &str, names: &[&str]) -> Output {
        Command::new("timeout")
            .arg("60")
            .arg(self.0.join("qemu/test-guest"))
            .arg("--inside")
            .args([self.0.join("kernel"), self.0.join("root.img")])
            .args(names)
            .env("GUEST", guest)
            .env_remove("DEBUG")
            .env_remove("PLOOP_TALLY")
            .output()
            .unwrap()
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn each_test_asked_for_is_run() {
    let out = Tree::new("all").run("lives", &["one", "t*"]);
    let said = text(&out.stdout);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(
        said.contains("ok    one") && said.contains("ok    two"),
        "{said}"
    );
}

#[test]
fn a_name_of_no_test_among_others_is_told() {
    let out = Tree::new("name").run("lives", &["one", "tow"]);
    let said = text(&out.stderr);
    assert!(!out.status.success());
    assert!(said.contains("no guest test is called 'tow'"), "{said}");
}

#[test]
fn a_worker_that_died_is_told() {
    let out = Tree::new("dead").run("dies", &["one", "two"]);
    let said = text(&out.stderr);
    assert!(!out.status.success());
    assert!(
        said.contains("a worker died: 0 of 2 tests have a result"),
        "{said}"
    );
}
