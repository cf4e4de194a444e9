// SPDX-License-Identifier: GPL-2.0
//! The repair that is made without being asked for: only what loses nothing.

use super::{repair, Image, Report};
use crate::error::{Code, Error, Result};
use crate::output;
use ploop_pure::problem::{Cure, Problem};
use ploop_pure::repair::{Plan, Scope};
use std::path::Path;

/// Checks a ploop1 image and mends it if it needs that. The steps made are returned. The caller
/// holds the locks of the image.
pub fn lossless(image: &Image) -> Result<Vec<String>> {
    let report = image.check()?.map_err(|p| image.not_an_image(p))?;
    let Some(plan) = Plan::new(&report.findings, Scope::Needed) else {
        return Ok(Vec::new());
    };
    if plan.cure() != Cure::Lossless {
        return Err(lossy(image.path(), &report));
    }
    carry_out(image, &report, &plan)
}

/// Carries out `plan`, which was found for `report`, and tells its steps.
pub fn carry_out(image: &Image, report: &Report, plan: &Plan) -> Result<Vec<String>> {
    repair::apply(image, &report.findings.header, plan)?;
    // Believe the repair only when a second look does.
    let after = image.check()?.map_err(|p| image.not_an_image(p))?;
    if Plan::new(&after.findings, Scope::Needed).is_some() {
        return Err(lossy(image.path(), &after));
    }
    let steps: Vec<String> = plan.steps().map(|s| s.to_string()).collect();
    for step in &steps {
        output::note(&format!("repaired: {step}"));
    }
    Ok(steps)
}

/// The worst problem, and how many more there are.
pub fn first_problem(report: &Report) -> String {
    let is_worst = |p: &&Problem| Some(p.cure()) == report.findings.cure();
    let worst = report.problems.iter().find(is_worst);
    let more = match report.problems.len() as u64 + report.nr_omitted {
        0 | 1 => String::new(),
        n => format!(", and {}", output::count(n - 1, "more problem")),
    };
    worst.map_or(String::new(), |p| format!("{p}{more}"))
}

/// The refusal of an image that is damaged for good.
pub fn lossy(path: &Path, report: &Report) -> Error {
    let at = path.display();
    let what = format!("{at} is damaged: {}", first_problem(report));
    Error::new(Code::Damaged, what).hint(format!(
        "mending it loses data, so that is not done by itself: see 'ploopctl check {at}', \
         then run 'ploopctl check --repair {at}'"
    ))
}
