//! `strftime_now`: the day and the time by Python's directives, in the names of the C locale. It tells UTC.

use std::time::{Duration, UNIX_EPOCH};

use super::eval::Machine;
use super::meter::Builder;
use super::{Outcome, Value};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A moment, taken apart.
struct Moment {
    year: i64,
    /// From 1.
    month: i64,
    day: i64,
    /// From 0.
    day_of_year: i64,
    /// From Sunday.
    weekday: i64,
    hour: i64,
    minute: i64,
    second: i64,
    micros: i64,
    unix: i64,
}

fn leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

impl Moment {
    fn of(since: Duration) -> Moment {
        let unix = i64::try_from(since.as_secs()).unwrap_or(0);
        let (days, second) = (unix / 86_400, unix % 86_400);
        // Years that begin in March put the leap day last (Hinnant, "chrono-compatible low-level date algorithms").
        let z = days + 719_468;
        let (era, day_of_era) = (z / 146_097, z % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * from_march + 2) / 153;
        let month = (month_from_march + 2) % 12 + 1;
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        let before_march = 59 + i64::from(leap(year));
        Moment {
            year,
            month,
            day: from_march - (153 * month_from_march + 2) / 5 + 1,
            day_of_year: if month <= 2 { from_march - 306 } else { from_march + before_march },
            weekday: (days + 4) % 7,
            hour: second / 3600,
            minute: second / 60 % 60,
            second: second % 60,
            micros: i64::from(since.subsec_micros()),
            unix,
        }
    }

    /// ISO's year and week: a week belongs to the year of its Thursday.
    fn iso(&self) -> (i64, i64) {
        let week = (self.day_of_year - (self.weekday + 6) % 7 + 10) / 7;
        let weeks = |year: i64| {
            let december_31 = |y: i64| (y + y / 4 - y / 100 + y / 400) % 7;
            if december_31(year) == 4 || december_31(year - 1) == 3 { 53 } else { 52 }
        };
        match week {
            0 => (self.year - 1, weeks(self.year - 1)),
            w if w > weeks(self.year) => (self.year + 1, 1),
            w => (self.year, w),
        }
    }

    /// What a directive stands for: a number with its width and what fills it, or a text.
    fn number(&self, directive: char) -> Option<(i64, usize, char)> {
        let hour = (self.hour + 11) % 12 + 1;
        Some(match directive {
            'Y' => (self.year, 1, '0'),
            'C' => (self.year / 100, 2, '0'),
            'y' => (self.year % 100, 2, '0'),
            'G' => (self.iso().0, 1, '0'),
            'g' => (self.iso().0 % 100, 2, '0'),
            'V' => (self.iso().1, 2, '0'),
            'U' => ((self.day_of_year + 7 - self.weekday) / 7, 2, '0'),
            'W' => ((self.day_of_year + 7 - (self.weekday + 6) % 7) / 7, 2, '0'),
            'm' => (self.month, 2, '0'),
            'd' => (self.day, 2, '0'),
            'e' => (self.day, 2, ' '),
            'j' => (self.day_of_year + 1, 3, '0'),
            'u' => ((self.weekday + 6) % 7 + 1, 1, '0'),
            'w' => (self.weekday, 1, '0'),
            'H' => (self.hour, 2, '0'),
            'k' => (self.hour, 2, ' '),
            'I' => (hour, 2, '0'),
            'l' => (hour, 2, ' '),
            'M' => (self.minute, 2, '0'),
            'S' => (self.second, 2, '0'),
            's' => (self.unix, 1, '0'),
            'f' => (self.micros, 6, '0'),
            _ => return None,
        })
    }

    fn text(&self, directive: char) -> Option<String> {
        let (month, day) = (MONTHS[self.month as usize - 1], DAYS[self.weekday as usize]);
        Some(match directive {
            'B' => month.into(),
            'b' | 'h' => month[..3].into(),
            'A' => day.into(),
            'a' => day[..3].into(),
            'p' => if self.hour < 12 { "AM" } else { "PM" }.into(),
            'P' => if self.hour < 12 { "am" } else { "pm" }.into(),
            'c' => self.all("%a %b %e %H:%M:%S %Y"),
            'x' | 'D' => self.all("%m/%d/%y"),
            'X' | 'T' => self.all("%H:%M:%S"),
            'R' => self.all("%H:%M"),
            'r' => self.all("%I:%M:%S %p"),
            'F' => self.all("%Y-%m-%d"),
            'n' => "\n".into(),
            't' => "\t".into(),
            '%' => "%".into(),
            // Python's moments of the local clock have no zone.
            'z' | 'Z' => String::new(),
            _ => return None,
        })
    }

    /// A format written out. What is no directive stays as it is.
    fn all(&self, format: &str) -> String {
        let mut out = String::new();
        let mut rest = format;
        while let Some(at) = rest.find('%') {
            out += &rest[..at];
            rest = &rest[at + 1..];
            let flag = rest.chars().next().filter(|c| "-_0^#".contains(*c));
            let Some(directive) = rest[usize::from(flag.is_some())..].chars().next() else {
                out.push('%');
                break;
            };
            let text = match (self.number(directive), flag) {
                (Some((n, _, _)), Some('-')) => Some(n.to_string()),
                (Some((n, width, fill)), flag) => {
                    let fill = match flag {
                        Some('_') => ' ',
                        Some('0') => '0',
                        _ => fill,
                    };
                    Some(if fill == ' ' { format!("{n:width$}") } else { format!("{n:0width$}") })
                }
                (None, flag) => self.text(directive).map(|t| match flag {
                    Some('^') => t.to_uppercase(),
                    Some('#') if directive == 'p' => t.to_lowercase(),
                    Some('#') => t.to_uppercase(),
                    _ => t,
                }),
            };
            let taken = usize::from(flag.is_some()) + directive.len_utf8();
            match text {
                Some(text) => out += &text,
                None => {
                    out.push('%');
                    out += &rest[..taken];
                }
            }
            rest = &rest[taken..];
        }
        out + rest
    }
}

impl Machine {
    /// `strftime_now(format)`.
    pub(super) fn strftime(&self, format: &str) -> Outcome<Value> {
        let moment = Moment::of(self.now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO));
        let mut out = Builder::new(&self.meter)?;
        // No directive is longer than 24 letters for its two.
        drop(self.meter.hold(format.len().saturating_mul(12))?);
        out.push(&moment.all(format))?;
        Ok(Value::Str(out.finish()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let at = |s: u64, f: &str| Moment::of(Duration::from_secs(s)).all(f);
        assert_eq!(at(0, "%d %B %Y, %A %a %H:%M:%S"), "01 January 1970, Thursday Thu 00:00:00");
        assert_eq!(at(951_827_696, "%Y-%m-%d %I:%M %p %b %y"), "2000-02-29 12:34 PM Feb 00");
        assert_eq!(at(1_735_689_599, "%Y-%m-%d 100%% %q %"), "2024-12-31 100% %q %");
        assert_eq!(
            at(951_827_696, "%j %U %W %V %G %u %w %-d %-m %e %D %c%Z%z"),
            "060 09 09 09 2000 2 2 29 2 29 02/29/00 Tue Feb 29 12:34:56 2000"
        );
        assert_eq!(at(1_735_689_599, "%G-W%V-%u %-I:%M%P %^a %j"), "2025-W01-2 11:59pm TUE 366");
        assert_eq!(at(86_400 * 59, "%j %-j %_d|%H"), "060 60  1|00");
    }
}
