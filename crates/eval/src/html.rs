//! A report in one HTML file: no script, no font, no image from elsewhere; light or dark as the reader's system asks.

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::Table;

/// A report, part after part.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Its name.
    pub title: String,
    /// What it shows.
    pub parts: Vec<Element>,
}

/// One part of a report. All text is plain; it is escaped here.
#[derive(Clone, Debug)]
pub enum Element {
    /// A heading.
    Heading(String),
    /// A paragraph.
    Text(String),
    /// The answer, for a reader in a hurry.
    Answer(Answer),
    /// A table; the first column and the last (words) to the left, the numbers between to the right. On a narrow page a
    /// row becomes a card.
    Table(Table),
    /// Lines over the layers, one a series.
    Layers {
        /// What is measured, with its unit.
        y: String,
        /// Name and a value for each layer.
        series: Vec<(String, Vec<f64>)>,
    },
    /// A bar for each label.
    Bars {
        /// What is measured, with its unit.
        y: String,
        /// Label and value.
        bars: Vec<(String, f64)>,
    },
    /// Size against perplexity.
    Scatter(Vec<Point>),
    /// Text that models wrote: who, the prompt, what followed.
    Samples(Vec<(String, String, String)>),
}

/// What a report comes to.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Whether it is a yes.
    pub yes: bool,
    /// The answer in a few words.
    pub words: String,
    /// Why, in a sentence.
    pub why: String,
    /// The figures that matter: what is measured, its value, what it was before.
    pub figures: Vec<[String; 3]>,
}

/// A model between size and perplexity.
#[derive(Clone, Debug)]
pub struct Point {
    /// Its name.
    pub label: String,
    /// Its size.
    pub bytes: u64,
    /// Its perplexity.
    pub ppl: f64,
    /// Whether it is a baseline (hollow) or the result (filled).
    pub baseline: bool,
}

/// Text for HTML, in elements and attributes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{FFFD}'),
            c => out.push(c),
        }
    }
    out
}

/// Text for HTML in which what stands between backticks is code.
fn with_code(text: &str) -> String {
    let parts = text.split('`').enumerate().map(|(i, part)| match i % 2 {
        0 => escape(part),
        _ => format!("<code>{}</code>", escape(part)),
    });
    parts.collect()
}

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1b1b1f;--paper:#fdfdfb;--faint:#8884;--yes:#1a7f3c;--no:#b3441e}\
@media (prefers-color-scheme:dark){:root{--ink:#e4e4e0;--paper:#17181b;--yes:#5cc47f;--no:#f0936b}}\
*{box-sizing:border-box}\
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:52rem;margin:2rem \
auto;padding:0 1rem}\
h1{font-size:1.5rem;line-height:1.25;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2rem 0 .5rem}\
.answer{border:2px solid var(--no);border-radius:.5rem;padding:.8rem 1rem}.answer.yes{border-color:var(--yes)}\
.answer strong{font-size:1.5rem;color:var(--no)}.answer.yes strong{color:var(--yes)}.answer p{margin:.2rem 0 .8rem}\
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(8rem,1fr));gap:.8rem;margin:0}\
.figures div{display:flex;flex-direction:column}.figures dt,.figures .was{font-size:.85rem;opacity:.75}\
.figures dd{margin:0}.figures .now{font-size:1.25rem;font-variant-numeric:tabular-nums}\
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}\
td,th{padding:.25rem .6rem;border-bottom:1px solid var(--faint);text-align:right;white-space:nowrap}\
td:first-child,th:first-child,td:last-child:not(:first-child),th:last-child:not(:first-child){text-align:left;white-space:normal}\
tr.own td{font-weight:600}\
@media (max-width:44rem){thead{display:none}table,tbody{display:block}\
tr{display:grid;grid-template-columns:1fr 1fr;padding:.5rem 0;border-bottom:1px solid var(--faint)}\
td{border:0;padding:.1rem 0;text-align:left;white-space:normal}td:empty{display:none}\
td:first-child{font-weight:600}td:first-child,td:last-child:not(:first-child){grid-column:1/-1}\
td:not(:first-child):not(:last-child)::before{content:attr(data-head) ' ';font-size:.85rem;opacity:.75}}\
svg{width:100%;max-width:40rem;height:auto;color:var(--ink)}\
figure{margin:1rem 0}figcaption{font-size:.9rem;opacity:.8}\
pre{white-space:pre-wrap;border-left:3px solid var(--faint);padding:.3rem 0 .3rem 1rem;overflow-wrap:anywhere}\
.prompt{opacity:.6}";

impl Report {
    /// The whole file.
    pub fn html(&self) -> String {
        let title = escape(&self.title);
        let body: String = self.parts.iter().map(Element::html).collect();
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
             <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n"
        )
    }
}

impl Element {
    fn html(&self) -> String {
        match self {
            Element::Heading(t) => format!("<h2>{}</h2>\n", escape(t)),
            Element::Text(t) => format!("<p>{}</p>\n", with_code(t)),
            Element::Answer(a) => a.html(),
            Element::Table(t) => {
                let head: String = t.head.iter().map(|c| format!("<th>{}</th>", escape(c))).collect();
                let cell = |(i, c): (usize, &String)| {
                    let head = t.head.get(i).map_or("", String::as_str);
                    format!("<td data-head=\"{}\">{}</td>", escape(head), escape(c))
                };
                let row = |cells: &Vec<String>| cells.iter().enumerate().map(cell).collect::<String>();
                let rows: String = t.rows.iter().map(|r| format!("<tr>{}</tr>\n", row(r))).collect();
                format!("<table>\n<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n{rows}</tbody>\n</table>\n")
            }
            Element::Layers { y, series } => figure(&legend(series), |area| layers(area, y, series)),
            Element::Bars { y, bars } => figure("", |area| draw_bars(area, y, bars)),
            Element::Scatter(points) => figure("Filled: the result. Hollow: baselines.", |area| scatter(area, points)),
            Element::Samples(samples) => samples
                .iter()
                .map(|(who, prompt, text)| {
                    let (who, prompt, text) = (escape(who), escape(prompt), escape(text));
                    format!("<h3>{who}</h3>\n<pre><span class=\"prompt\">{prompt}</span>{text}</pre>\n")
                })
                .collect(),
        }
    }
}

impl Answer {
    fn html(&self) -> String {
        let figure = |[what, now, was]: &[String; 3]| {
            let [what, now, was] = [what, now, was].map(|t| escape(t));
            format!("<div><dt>{what}</dt><dd class=\"now\">{now}</dd><dd class=\"was\">{was}</dd></div>\n")
        };
        let figures: String = self.figures.iter().map(figure).collect();
        let (class, words, why) =
            (if self.yes { "answer yes" } else { "answer" }, escape(&self.words), escape(&self.why));
        format!(
            "<section class=\"{class}\">\n<strong>{words}</strong>\n<p>{why}</p>\n<dl \
             class=\"figures\">\n{figures}</dl>\n</section>\n"
        )
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Stands for the text colour while drawing and becomes `currentColor`, so that one drawing serves light and dark.
const INK: RGBColor = RGBColor(1, 2, 3);
const INK_HEX: &str = "#010203";
/// Legible on white and on black.
const SERIES: [RGBColor; 8] = [
    RGBColor(46, 134, 222),
    RGBColor(225, 112, 40),
    RGBColor(50, 160, 90),
    RGBColor(190, 80, 190),
    RGBColor(200, 160, 20),
    RGBColor(110, 120, 140),
    RGBColor(20, 165, 175),
    RGBColor(200, 60, 80),
];

/// Pixels of a drawing. It is shown at up to 640 and down to some 370 across: letters of [`LETTERS`] can be read at
/// both.
const CANVAS: (u32, u32) = (560, 380);
const LETTERS: i32 = 16;

/// A drawing with a caption, which is HTML already.
fn figure(caption: &str, draw: impl FnOnce(&Area<'_>) -> Drawn) -> String {
    let mut svg = String::new();
    let drawn = draw(&SVGBackend::with_string(&mut svg, CANVAS).into_drawing_area());
    match drawn {
        Ok(()) => {
            let svg = svg.replace(INK_HEX, "currentColor");
            format!("<figure>\n{svg}<figcaption>{caption}</figcaption>\n</figure>\n")
        }
        Err(e) => format!("<p>This figure could not be drawn: {}</p>\n", escape(&e.to_string())),
    }
}

/// The names of series with their colours: beside the drawing, where they cover nothing.
fn legend(series: &[(String, Vec<f64>)]) -> String {
    let one = |(i, (name, _)): (usize, &(String, Vec<f64>))| {
        let RGBColor(r, g, b) = SERIES[i % SERIES.len()];
        format!("<span style=\"color:rgb({r},{g},{b})\">&#9632;</span> {} ", escape(name))
    };
    series.iter().enumerate().map(one).collect()
}

/// A range around finite values, a little wider than they are.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) =
        values.filter(|v| v.is_finite()).fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return (0.0, 1.0);
    }
    let air = if high > low { (high - low) * 0.06 } else { high.abs().max(1e-9) * 0.1 };
    (low - air, high + air)
}

/// A number in as few characters as it takes to tell.
fn short(v: &f64) -> String {
    let a = v.abs();
    if a != 0.0 && !(1e-3..1e5).contains(&a) {
        format!("{v:.1e}")
    } else {
        format!("{:.4}", v).trim_end_matches('0').trim_end_matches('.').into()
    }
}

fn text() -> TextStyle<'static> {
    ("sans-serif", LETTERS).into_font().color(&INK)
}

/// A chart with axes; `inside` draws into it.
macro_rules! chart {
    ($area:expr, $x:expr, $y:expr, $x_name:expr, $y_name:expr, $labels:expr, $x_text:expr, $y_text:expr) => {{
        let mut chart = ChartBuilder::on($area)
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d($x.0..$x.1, $y.0..$y.1)?;
        chart
            .configure_mesh()
            .x_labels($labels)
            .y_labels(7)
            .x_desc($x_name)
            .y_desc($y_name)
            .axis_style(INK.mix(0.6))
            .bold_line_style(INK.mix(0.15))
            .light_line_style(TRANSPARENT)
            .label_style(text())
            .axis_desc_style(text())
            .x_label_formatter($x_text)
            .y_label_formatter($y_text)
            .draw()?;
        chart
    }};
}

fn layers(area: &Area<'_>, y: &str, series: &[(String, Vec<f64>)]) -> Drawn {
    let longest = series.iter().map(|(_, v)| v.len()).max().unwrap_or(0).max(2);
    let ys = range(series.iter().flat_map(|(_, v)| v.iter().copied()).chain([0.0]));
    let xs = (0.0, longest as f64 - 1.0);
    let mut chart = chart!(area, xs, ys, "layer", y, longest.min(10), &|v: &f64| format!("{v:.0}"), &short);
    for (i, (_, values)) in series.iter().enumerate() {
        let colour = SERIES[i % SERIES.len()];
        let points = values.iter().enumerate().filter(|(_, v)| v.is_finite()).map(|(l, &v)| (l as f64, v));
        chart.draw_series(points.clone().map(|p| Circle::new(p, 3, colour.filled())))?;
        chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
    }
    area.present().map_err(Into::into)
}

fn draw_bars(area: &Area<'_>, y: &str, bars: &[(String, f64)]) -> Drawn {
    let ys = range(bars.iter().map(|b| b.1).chain([0.0]));
    let ys = (ys.0.min(0.0), ys.1);
    let xs = (0.0, bars.len().max(1) as f64);
    let mut chart = chart!(area, xs, ys, "", y, 0, &|_: &f64| String::new(), &short);
    for (i, (label, value)) in bars.iter().enumerate().filter(|(_, b)| b.1.is_finite()) {
        let (left, right) = (i as f64 + 0.15, i as f64 + 0.85);
        chart.draw_series([Rectangle::new([(left, 0.0), (right, *value)], SERIES[0].filled())])?;
        let at = chart.backend_coord(&(i as f64 + 0.5, ys.0));
        area.draw_text(label, &text().pos(centre()), (at.0, at.1 + 6))?;
        let top = chart.backend_coord(&(i as f64 + 0.5, value.max(0.0)));
        area.draw_text(&short(value), &text().pos(centre()), (top.0, top.1 - 16))?;
    }
    area.present().map_err(Into::into)
}

fn centre() -> plotters::style::text_anchor::Pos {
    use plotters::style::text_anchor::{HPos, Pos, VPos};
    Pos::new(HPos::Center, VPos::Top)
}

fn scatter(area: &Area<'_>, points: &[Point]) -> Drawn {
    let mega = |p: &Point| p.bytes as f64 / 1e6;
    let mut seen: Vec<&Point> = points.iter().filter(|p| p.ppl.is_finite() && p.ppl > 0.0).collect();
    // What others lie on is drawn first; the result, which is what the drawing is about, comes last.
    seen.sort_by_key(|p| !p.baseline);
    let xs = range(seen.iter().map(|p| mega(p)));
    // By its logarithm, since one broken baseline would lay all others on one line.
    let ys = range(seen.iter().map(|p| p.ppl.ln()));
    let mut chart =
        chart!(area, xs, ys, "size (MB)", "perplexity", 6, &short, &|v: &f64| short(&three_digits(v.exp())));
    let mut taken: Vec<Rect> = Vec::new();
    let spots: Vec<(i32, i32)> = seen.iter().map(|p| chart.backend_coord(&(mega(p), p.ppl.ln()))).collect();
    taken.extend(spots.iter().map(|&(x, y)| Rect { left: x - 7, top: y - 7, right: x + 7, bottom: y + 7 }));
    let mut labels = Vec::new();
    for (p, &(x, y)) in seen.iter().zip(&spots).rev() {
        let wide = area.estimate_text_size(&p.label, &text())?.0 as i32;
        let free = place(x, y, wide, &taken);
        taken.push(free);
        labels.push((free, &p.label));
        // To the nearer end of a label that had to go far, below all text.
        let end = (if free.right < x { free.right } else { free.left }, (free.top + free.bottom) / 2);
        if (end.0 - x).abs().max((end.1 - y).abs()) > 2 * LETTERS {
            area.draw(&PathElement::new([(x, y), end], INK.mix(0.25)))?;
        }
    }
    for p in &seen {
        let style = if p.baseline { SERIES[5].stroke_width(2) } else { SERIES[1].filled() };
        chart.draw_series([Circle::new((mega(p), p.ppl.ln()), if p.baseline { 5 } else { 7 }, style)])?;
    }
    for (free, label) in labels {
        area.draw_text(label, &text(), (free.left, free.top))?;
    }
    area.present().map_err(Into::into)
}

/// `v` in the digits that a label on an axis needs.
fn three_digits(v: f64) -> f64 {
    let unit = 10f64.powf(v.abs().max(1e-300).log10().floor() - 2.0);
    (v / unit).round() * unit
}

/// A rectangle of the drawing, in pixels.
#[derive(Clone, Copy)]
struct Rect {
    left: i32,
    top: i32,
    right: i32,
    bottom: i32,
}

impl Rect {
    fn meets(&self, other: &Rect) -> bool {
        self.left < other.right && other.left < self.right && self.top < other.bottom && other.top < self.bottom
    }
}

/// Where a label of so many pixels finds room near a point: beside it, else above or below, farther and farther away,
/// inside the drawing.
fn place(x: i32, y: i32, wide: i32, taken: &[Rect]) -> Rect {
    let (width, height) = (CANVAS.0 as i32, CANVAS.1 as i32);
    let at = |left: i32, top: i32| Rect { left, top, right: left + wide, bottom: top + LETTERS };
    let beside = |dy: i32| [at(x + 11, y - LETTERS / 2 + dy), at(x - 11 - wide, y - LETTERS / 2 + dy)];
    let around = (0..40).flat_map(|i| {
        let d = i * LETTERS / 2;
        [beside(-d), beside(d), [at(x - wide / 2, y - 10 - LETTERS - d), at(x - wide / 2, y + 10 + d)]].concat()
    });
    let inside = |b: &Rect| b.left >= 66 && b.right <= width && b.top >= 0 && b.bottom <= height - 50;
    let free = around.into_iter().find(|b| inside(b) && !taken.iter().any(|t| t.meets(b)));
    // A drawing so full that labels have to lie on each other still shows all of them.
    free.unwrap_or_else(|| at((width - wide).min(x + 11).max(66), (y - LETTERS / 2).clamp(0, height - 50 - LETTERS)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Report {
        let mut table = Table::new(["model", "ppl"]);
        table.row(["<f16> & \"co\"", "12.3"]);
        let point = |label: &str, bytes, ppl, baseline| Point { label: label.into(), bytes, ppl, baseline };
        Report {
            title: "Report of <script>alert(1)</script>".into(),
            parts: vec![
                Element::Answer(Answer {
                    yes: true,
                    words: "It pays <b>".into(),
                    why: "Smaller & as good.".into(),
                    figures: vec![["size".into(), "90 MB".into(), "269 MB before".into()]],
                }),
                Element::Heading("Layers".into()),
                Element::Text("Errors, layer by layer.".into()),
                Element::Table(table),
                Element::Layers {
                    y: "relative error".into(),
                    series: vec![
                        ("wanda".into(), vec![0.1, 0.2, f64::NAN, 0.15]),
                        ("rtn".into(), vec![0.3, 0.2, 0.1, 0.2]),
                    ],
                },
                Element::Layers { y: "nothing".into(), series: vec![] },
                Element::Bars { y: "tokens/s".into(), bars: vec![("dense".into(), 40.0), ("2:4".into(), 61.5)] },
                Element::Scatter(vec![
                    point("f16", 269_000_000, 15.1, true),
                    point("int8", 140_000_000, 15.11, true),
                    point("int4 & <sparse>", 90_000_000, 17.0, false),
                    point("broken", 90_000_000, f64::INFINITY, true),
                ]),
                Element::Scatter(vec![]),
                Element::Samples(vec![("dense".into(), "Once".into(), " upon <a> time\u{0}".into())]),
            ],
        }
    }

    #[test]
    fn nothing_from_elsewhere_and_no_text_becomes_markup() {
        let html = sample().html();
        assert!(
            !html.contains("<script") && !html.contains("<a>") && !html.contains("<sparse>") && !html.contains('\u{0}')
        );
        assert!(html.contains("&lt;f16&gt; &amp; &quot;co&quot;") && html.contains("prefers-color-scheme"));
        for outside in ["src=", "href=", "@import", "url(", "<link"] {
            assert!(!html.contains(outside), "{outside}");
        }
        assert!(html.matches("http").count() == html.matches("http://www.w3.org/2000/svg").count());
        assert_eq!(html.matches("<svg").count(), 5);
        assert!(!html.contains("could not be drawn") && !html.contains(INK_HEX) && !html.contains("NaN"));
        // Every element closes.
        for tag in ["table", "svg", "figure", "pre", "p", "tr", "td", "section", "div", "dl"] {
            let open = html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
            assert_eq!(open, html.matches(&format!("</{tag}>")).count(), "{tag}");
        }
    }

    #[test]
    fn labels_lie_on_nothing_and_inside() {
        // Twelve models of one size and almost one loss.
        let mut taken = vec![];
        for i in 0..12 {
            let free = place(530 - i, 180 + i, 90, &taken);
            assert!(taken.iter().all(|t: &Rect| !t.meets(&free)), "{i}");
            assert!(
                free.left >= 66 && free.right <= CANVAS.0 as i32 && free.top >= 0 && free.bottom <= CANVAS.1 as i32
            );
            taken.push(free);
        }
    }
}
