//! The program as it is called. That this test stands beside it also has `cargo test --workspace` build it, so that CI
//! need not build its dependencies twice.

use std::process::Command;

#[test]
fn what_is_not_known_is_answered_with_what_is() {
    let out = Command::new(env!("CARGO_BIN_EXE_xtask")).arg("polish").output().unwrap();
    assert!(!out.status.success());
    let said = String::from_utf8_lossy(&out.stderr);
    for verb in ["check", "tables", "evidence", "new-method"] {
        assert!(said.contains(verb), "{said}");
    }
    let out = Command::new(env!("CARGO_BIN_EXE_xtask")).args(["check", "gravity"]).output().unwrap();
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("gravity"), "{out:?}");
}
