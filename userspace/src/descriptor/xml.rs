// SPDX-License-Identifier: GPL-2.0
//! An XML file as a tree that is written back byte for byte where nothing was changed.
//!
//! Only what our file needs: UTF-8, no document type, no entities of its own. Nothing here knows
//! what the elements mean.

use quick_xml::escape::{escape, unescape};
use quick_xml::events::Event;
use quick_xml::Reader;

/// Elements inside each other, at most; ours go 5 deep.
const DEPTH_MAX: usize = 32;

/// An element and what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Element {
    name: String,
    /// The start tag as it was written.
    start: String,
    /// The end tag; empty if the start tag ends the element.
    end: String,
    nodes: Vec<Node>,
}

/// What an element contains.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Element(Element),
    /// Text, with entities as they were written.
    Text(String),
    /// The text of a CDATA section.
    Data(String),
    /// Comments and the like, as they were written.
    Other(String),
}

/// A whole file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    before: String,
    /// The root element.
    pub root: Element,
    after: String,
}

impl Document {
    /// Reads a file; the error says what is wrong and at which byte.
    pub fn parse(text: &str) -> Result<Self, String> {
        let inner = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut before = text[..text.len() - inner.len()].to_owned();
        let text = inner;
        let mut reader = Reader::from_str(text);
        let mut after = String::new();
        let mut root: Option<Element> = None;
        let mut open: Vec<Element> = Vec::new();
        let mut from = 0;
        loop {
            let event = reader.read_event();
            let position = reader.error_position();
            let event = event.map_err(|e| format!("{e} (at byte {position})"))?;
            let to = usize::try_from(reader.buffer_position()).unwrap_or(usize::MAX);
            let raw = text.get(from..to).unwrap_or_default().to_owned();
            let start_at = from;
            let bad = |what: &str| Err(format!("{what} (at byte {start_at})"));
            let node = match event {
                Event::Start(start) => {
                    let name = String::from_utf8_lossy(start.name().as_ref()).into_owned();
                    if open.len() == DEPTH_MAX {
                        return bad("elements are too deep inside each other");
                    }
                    if open.is_empty() && root.is_some() {
                        return bad("there is more than one root element");
                    }
                    open.push(Element {
                        name,
                        start: raw,
                        end: String::new(),
                        nodes: Vec::new(),
                    });
                    from = to;
                    continue;
                }
                Event::Empty(start) => Node::Element(Element {
                    name: String::from_utf8_lossy(start.name().as_ref()).into_owned(),
                    start: raw,
                    end: String::new(),
                    nodes: Vec::new(),
                }),
                Event::End(_) => {
                    let Some(mut element) = open.pop() else {
                        return bad("an element ends that did not begin");
                    };
                    element.end = raw;
                    Node::Element(element)
                }
                Event::Text(_) => Node::Text(raw),
                Event::GeneralRef(_) => match unescape(&raw) {
                    Ok(_) => Node::Text(raw),
                    Err(e) => return bad(&e.to_string()),
                },
                Event::CData(data) => match std::str::from_utf8(&data) {
                    Ok(inner) => {
                        if inner.len() + "<![CDATA[]]>".len() != raw.len() {
                            return bad("a CDATA section is malformed");
                        }
                        Node::Data(raw)
                    }
                    Err(e) => return bad(&e.to_string()),
                },
                Event::Comment(_) | Event::PI(_) => Node::Other(raw),
                Event::Decl(decl) => {
                    if let Some(encoding) = decl.encoding() {
                        let encoding = encoding.map_err(|e| e.to_string())?;
                        if !encoding.eq_ignore_ascii_case(b"utf-8")
                            && !encoding.eq_ignore_ascii_case(b"us-ascii")
                        {
                            return bad("the encoding is not UTF-8");
                        }
                    }
                    Node::Other(raw)
                }
                Event::DocType(_) => return bad("a document type is not accepted"),
                Event::Eof => break,
            };
            from = to;
            match (open.last_mut(), node) {
                (Some(parent), node) => parent.nodes.push(node),
                (None, Node::Element(element)) if root.is_none() => root = Some(element),
                (None, Node::Element(_)) => return bad("there is more than one root element"),
                (None, Node::Text(raw) | Node::Data(raw)) if !raw.trim().is_empty() => {
                    return bad("there is text outside of the root element")
                }
                (None, Node::Text(raw) | Node::Data(raw) | Node::Other(raw)) => match root {
                    None => before += &raw,
                    Some(_) => after += &raw,
                },
            }
        }
        if let Some(element) = open.last() {
            return Err(format!("<{}> does not end", element.name));
        }
        match root {
            Some(root) => Ok(Self {
                before,
                root,
                after,
            }),
            None => Err("there is no element in it".to_owned()),
        }
    }

    /// The whole file.
    pub fn text(&self) -> String {
        let mut text = self.before.clone();
        self.root.write(&mut text);
        text + &self.after
    }
}

impl Element {
    /// An element with nothing but text in it.
    pub fn with_text(name: &str, text: &str) -> Self {
        Self {
            name: name.to_owned(),
            start: format!("<{name}>"),
            end: format!("</{name}>"),
            nodes: vec![Node::Text(escape(text).into_owned())],
        }
    }

    /// An element with elements in it, each on a line; `depth` is how deep it is to be.
    pub fn with_elements(name: &str, depth: usize, elements: Vec<Self>) -> Self {
        let mut nodes = Vec::new();
        for element in elements {
            nodes.push(Node::Text(line_break(depth + 1)));
            nodes.push(Node::Element(element));
        }
        nodes.push(Node::Text(line_break(depth)));
        Self {
            name: name.to_owned(),
            start: format!("<{name}>"),
            end: format!("</{name}>"),
            nodes,
        }
    }

    /// An element with nothing in it, but attributes that need no escaping.
    pub fn empty(name: &str, attributes: &str) -> Self {
        let blank = if attributes.is_empty() { "" } else { " " };
        Self {
            name: name.to_owned(),
            start: format!("<{name}{blank}{attributes}/>"),
            end: String::new(),
            nodes: Vec::new(),
        }
    }

    /// The same with another start tag.
    pub fn with_start(mut self, start: &str) -> Self {
        self.start = start.to_owned();
        self
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The value of its attribute `name`.
    pub fn attribute(&self, name: &str) -> Option<String> {
        let mut reader = Reader::from_str(&self.start);
        let (Ok(Event::Start(start)) | Ok(Event::Empty(start))) = reader.read_event() else {
            return None;
        };
        let value = start.try_get_attribute(name).ok().flatten()?;
        let raw = std::str::from_utf8(&value.value).ok()?;
        Some(unescape(raw).ok()?.into_owned())
    }

    /// The elements called `name`.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Self> + 'a {
        self.nodes.iter().filter_map(move |n| match n {
            Node::Element(e) if e.name == name => Some(e),
            Node::Element(_) | Node::Text(_) | Node::Data(_) | Node::Other(_) => None,
        })
    }

    /// The same, to be changed.
    pub fn all_mut<'a>(&'a mut self, name: &'a str) -> impl Iterator<Item = &'a mut Self> + 'a {
        self.nodes.iter_mut().filter_map(move |n| match n {
            Node::Element(e) if e.name == name => Some(e),
            Node::Element(_) | Node::Text(_) | Node::Data(_) | Node::Other(_) => None,
        })
    }

    /// The first element called `name`.
    pub fn first(&self, name: &str) -> Option<&Self> {
        self.nodes.iter().find_map(|n| match n {
            Node::Element(e) if e.name == name => Some(e),
            Node::Element(_) | Node::Text(_) | Node::Data(_) | Node::Other(_) => None,
        })
    }

    /// The same, to be changed.
    pub fn first_mut(&mut self, name: &str) -> Option<&mut Self> {
        self.nodes.iter_mut().find_map(|n| match n {
            Node::Element(e) if e.name == name => Some(e),
            Node::Element(_) | Node::Text(_) | Node::Data(_) | Node::Other(_) => None,
        })
    }

    /// Its own text, without blanks around it.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for node in &self.nodes {
            match node {
                // What cannot be understood was refused when it was read.
                Node::Text(raw) => text += &unescape(raw).unwrap_or_default(),
                Node::Data(raw) => {
                    text += raw
                        .strip_prefix("<![CDATA[")
                        .and_then(|r| r.strip_suffix("]]>"))
                        .unwrap_or(raw);
                }
                Node::Element(_) | Node::Other(_) => {}
            }
        }
        text.trim().to_owned()
    }

    /// Gives it another text, unless it says the same already. Comments in it stay.
    pub fn set_text(&mut self, text: &str) {
        if self.text() == text {
            return;
        }
        self.nodes.retain(|n| match n {
            Node::Text(_) | Node::Data(_) => false,
            Node::Element(_) | Node::Other(_) => true,
        });
        self.nodes.insert(0, Node::Text(escape(text).into_owned()));
        self.unfold();
    }

    /// Sets the text of the element `name` in this one, which is added if it is not there.
    pub fn set(&mut self, name: &str, text: &str, depth: usize) {
        match self.first_mut(name) {
            Some(element) => element.set_text(text),
            None => self.add(Self::with_text(name, text), depth),
        }
    }

    /// Adds `element` behind the last one of its name, or at the end; as the ones before it are
    /// laid out. `depth` is that of this element.
    pub fn add(&mut self, element: Self, depth: usize) {
        self.unfold();
        let is_of_name = |n: &Node| matches!(n, Node::Element(e) if e.name == element.name);
        let is_element = |n: &Node| matches!(n, Node::Element(_));
        let behind = self.nodes.iter().rposition(is_of_name);
        let behind = behind.or_else(|| self.nodes.iter().rposition(is_element));
        match behind {
            Some(at) => {
                let blank = match at.checked_sub(1).and_then(|i| self.nodes.get(i)) {
                    Some(Node::Text(raw)) if raw.trim().is_empty() => Some(raw.clone()),
                    _ => None,
                };
                self.nodes.insert(at + 1, Node::Element(element));
                if let Some(blank) = blank {
                    self.nodes.insert(at + 1, Node::Text(blank));
                }
            }
            None => {
                self.nodes
                    .retain(|n| !matches!(n, Node::Text(raw) if raw.trim().is_empty()));
                self.nodes.push(Node::Text(line_break(depth + 1)));
                self.nodes.push(Node::Element(element));
                self.nodes.push(Node::Text(line_break(depth)));
            }
        }
    }

    /// Removes the elements called `name` that `which` chooses, with the blanks before them.
    pub fn remove(&mut self, name: &str, mut which: impl FnMut(&Self) -> bool) {
        let mut at = 0;
        while at < self.nodes.len() {
            let is_chosen =
                matches!(&self.nodes[at], Node::Element(e) if e.name == name && which(e));
            if !is_chosen {
                at += 1;
                continue;
            }
            self.nodes.remove(at);
            let is_blank = |n: &Node| matches!(n, Node::Text(raw) if raw.trim().is_empty());
            if at > 0 && is_blank(&self.nodes[at - 1]) {
                self.nodes.remove(at - 1);
                at -= 1;
            }
        }
    }

    /// Makes `<a/>` into `<a></a>`, so that something can be put in.
    fn unfold(&mut self) {
        if !self.end.is_empty() {
            return;
        }
        let inner = self.start.trim_end_matches("/>").trim_end();
        self.start = format!("{inner}>");
        self.end = format!("</{}>", self.name);
    }

    fn write(&self, to: &mut String) {
        *to += &self.start;
        for node in &self.nodes {
            match node {
                Node::Element(element) => element.write(to),
                Node::Text(raw) | Node::Data(raw) | Node::Other(raw) => *to += raw,
            }
        }
        *to += &self.end;
    }
}

fn line_break(depth: usize) -> String {
    format!("\n{}", "  ".repeat(depth))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_changed_is_written_as_it_was() {
        let text =
            "\u{feff}<?xml version='1.0'?>\n<!-- a -->\n<r a = \"1\"><b/><c>x &amp; y&#33;</c>\
                    <![CDATA[<d>]]><?pi x?><e  >\n</e ></r>\n<!-- end -->\n";
        let document = Document::parse(text).unwrap();
        assert_eq!(document.text(), text);
        assert_eq!(document.root.first("c").unwrap().text(), "x & y!");
        assert_eq!(document.root.text(), "<d>");
        assert_eq!(document.root.attribute("a").as_deref(), Some("1"));
    }

    #[test]
    fn changes_keep_the_layout() {
        let text = "<r>\n  <i>1</i>\n  <i>2</i>\n  <!-- c -->\n</r>";
        let mut document = Document::parse(text).unwrap();
        document.root.add(Element::with_text("i", "<3>"), 0);
        let want = "<r>\n  <i>1</i>\n  <i>2</i>\n  <i>&lt;3&gt;</i>\n  <!-- c -->\n</r>";
        assert_eq!(document.text(), want);
        document.root.remove("i", |e| e.text() == "<3>");
        assert_eq!(document.text(), text);
        document.root.first_mut("i").unwrap().set_text("9");
        assert_eq!(document.text(), text.replace('1', "9"));
        let mut document = Document::parse("<r><s x='1' /></r>").unwrap();
        document.root.first_mut("s").unwrap().set("t", "u", 1);
        let want = "<r><s x='1'>\n    <t>u</t>\n  </s></r>";
        assert_eq!(document.text(), want);
    }

    #[test]
    fn what_is_no_such_file_is_refused() {
        for bad in [
            "",
            "  ",
            "text",
            "<a>",
            "</a>",
            "<a></b>",
            "<a/><b/>",
            "<a/>text",
            "<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>",
            "<a>&x;</a>",
            "<a>& </a>",
            "<?xml version='1.0' encoding='utf-16'?><a/>",
        ] {
            assert!(Document::parse(bad).is_err(), "{bad}");
        }
        let deep = "<a>".repeat(DEPTH_MAX + 1) + &"</a>".repeat(DEPTH_MAX + 1);
        assert!(Document::parse(&deep).is_err());
    }
}
