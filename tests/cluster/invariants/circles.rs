//! Files of one crate import each other in no circle, so that each can be read after those that it needs.
//!
//! An import is a `use` or a path in code that leads to an item of another file, re-exports followed to the file that
//! defines the item. A parent that only declares and re-exports a child does not import it; a child that names an item
//! of its parent does import the parent. Code of tests and the insides of macros are not read.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use syn::visit::{self, Visit};

/// The path of a module from its crate's root: `["cache", "redis"]`, empty for `lib.rs`.
type ModulePath = Vec<String>;

/// One file of a crate.
#[derive(Default)]
struct File {
    path: PathBuf,
    /// What `use` brings into the file's scope: the name in this file and the path that it stands for.
    names: BTreeMap<String, ModulePath>,
    /// The names above that a `pub use` makes, which import nothing unless the file also uses them.
    exported: BTreeSet<String>,
    /// Paths from the crate's root to what the file imports or names.
    needs: BTreeSet<ModulePath>,
    /// The first identifiers of paths in the file's code.
    mentions: BTreeSet<String>,
    children: BTreeSet<String>,
}

type Files = BTreeMap<ModulePath, File>;

/// Reads one file: its modules, imports and the paths in its code.
struct Reader<'a> {
    module: &'a [String],
    file: &'a mut File,
    /// How many inline modules of the file are open.
    depth: usize,
}

fn only_in_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        syn::Meta::List(list) if list.path.is_ident("cfg") => list.tokens.to_string() == "test",
        _ => false,
    })
}

impl Reader<'_> {
    /// The path from the crate's root, or nothing where it leads out of the crate.
    fn absolute(&self, path: &[String]) -> Option<ModulePath> {
        let mut module = self.module.to_vec();
        let mut depth = self.depth;
        let mut rest = path;
        match path.first().map(String::as_str)? {
            "crate" => return Some(path[1..].to_vec()),
            "self" => rest = &path[1..],
            "super" => {}
            child if self.depth == 0 && self.file.children.contains(child) => {}
            _ => return None,
        }
        while let Some("super") = rest.first().map(String::as_str) {
            // Out of an inline module, a step up stays in the file.
            match depth {
                0 => drop(module.pop()),
                _ => depth -= 1,
            }
            rest = &rest[1..];
        }
        module.extend_from_slice(rest);
        Some(module)
    }

    fn read_use(&mut self, exported: bool, tree: &syn::UseTree, mut path: ModulePath) {
        match tree {
            syn::UseTree::Path(inner) => {
                path.push(inner.ident.to_string());
                self.read_use(exported, &inner.tree, path);
            }
            syn::UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.read_use(exported, tree, path.clone()));
            }
            syn::UseTree::Glob(_) => self.import(exported, None, &path),
            syn::UseTree::Name(name) if name.ident == "self" => {
                self.import(exported, path.last().cloned(), &path);
            }
            syn::UseTree::Name(name) => {
                path.push(name.ident.to_string());
                self.import(exported, Some(name.ident.to_string()), &path);
            }
            syn::UseTree::Rename(rename) => {
                path.push(rename.ident.to_string());
                self.import(exported, Some(rename.rename.to_string()), &path);
            }
        }
    }

    fn import(&mut self, exported: bool, name: Option<String>, path: &[String]) {
        let Some(path) = self.absolute(path) else { return };
        let own_child = path.strip_prefix(self.module).is_some_and(|rest| !rest.is_empty());
        match name {
            Some(name) => {
                if exported && own_child {
                    self.file.exported.insert(name.clone());
                } else {
                    self.file.needs.insert(path.clone());
                }
                self.file.names.insert(name, path);
            }
            None if exported && own_child => {}
            None => drop(self.file.needs.insert(path)),
        }
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        let attributes = match item {
            syn::Item::Fn(item) => &item.attrs,
            syn::Item::Impl(item) => &item.attrs,
            syn::Item::Mod(item) => &item.attrs,
            syn::Item::Struct(item) => &item.attrs,
            syn::Item::Use(item) => &item.attrs,
            _ => return visit::visit_item(self, item),
        };
        if !only_in_tests(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.depth += 1;
        visit::visit_item_mod(self, item);
        self.depth -= 1;
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        let exported = !matches!(item.vis, syn::Visibility::Inherited);
        self.read_use(exported, &item.tree, Vec::new());
    }

    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {
        // `pub(in crate::cache)` says who may see, and needs nothing.
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: ModulePath = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.file.mentions.insert(segments[0].clone());
        if segments.len() > 1
            && let Some(path) = self.absolute(&segments)
        {
            self.file.needs.insert(path);
        }
        visit::visit_path(self, path);
    }
}

/// Reads a file and, through its `mod` lines, those below it.
fn read(path: &Path, module: &[String], files: &mut Files) {
    let source = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let parsed = syn::parse_file(&source).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut file = File { path: path.to_owned(), ..File::default() };
    for item in &parsed.items {
        if let syn::Item::Mod(item) = item
            && item.content.is_none()
            && !only_in_tests(&item.attrs)
            // A file of another crate that this one includes.
            && !item.attrs.iter().any(|attribute| attribute.path().is_ident("path"))
        {
            file.children.insert(item.ident.to_string());
        }
    }
    Reader { module, file: &mut file, depth: 0 }.visit_file(&parsed);
    let folder = match path.file_name().and_then(|name| name.to_str()) {
        Some("lib.rs" | "mod.rs") => path.parent().unwrap().to_owned(),
        _ => path.with_extension(""),
    };
    for child in &file.children {
        let candidates = [folder.join(format!("{child}.rs")), folder.join(child).join("mod.rs")];
        let found = candidates.iter().find(|candidate| candidate.exists());
        let found = found.unwrap_or_else(|| panic!("{}: no file of mod {child}", path.display()));
        read(found, &[module, std::slice::from_ref(child)].concat(), files);
    }
    files.insert(module.to_vec(), file);
}

/// The file that defines what a path leads to.
fn definer(files: &Files, path: &[String]) -> ModulePath {
    let mut path = path.to_vec();
    // A name may be exported by one file after the other; more often than this only in a circle of names.
    for _ in 0..8 {
        let depth = (0..=path.len()).rev().find(|depth| files.contains_key(&path[..*depth])).unwrap_or(0);
        let (module, rest) = path.split_at(depth);
        let name = rest.first().and_then(|name| files[module].names.get(name));
        match name {
            Some(target) if target[..] != path[..] => path = [target, &rest[1..]].concat(),
            _ => return module.to_vec(),
        }
    }
    path
}

/// Which files each file imports, with one path that it does so by.
fn imports(files: &Files) -> BTreeMap<&ModulePath, BTreeMap<ModulePath, String>> {
    let of_file = |(module, file): (_, &File)| {
        let used = file.exported.intersection(&file.mentions).map(|name| &file.names[name]);
        let needs = file.needs.iter().chain(used);
        let needs = needs.map(|path| (definer(files, path), path.join("::")));
        (module, needs.filter(|(target, _)| target != module).collect())
    };
    files.iter().map(of_file).collect()
}

/// The shortest way from a file back to itself, as the files on it.
fn circle<'a>(
    imports: &'a BTreeMap<&ModulePath, BTreeMap<ModulePath, String>>,
    start: &'a ModulePath,
) -> Option<Vec<&'a ModulePath>> {
    let mut ways = vec![vec![start]];
    let mut seen = BTreeSet::new();
    while !ways.is_empty() {
        let mut longer = Vec::new();
        for way in ways {
            for next in imports[way[way.len() - 1]].keys() {
                if next == start {
                    return Some(way);
                }
                if seen.insert(next) {
                    longer.push([&way[..], &[next]].concat());
                }
            }
        }
        ways = longer;
    }
    None
}

/// The circles of a crate in words, each once.
fn circles(source: &Path) -> Vec<String> {
    let mut files = Files::new();
    read(&source.join("lib.rs"), &[], &mut files);
    assert!(!files.is_empty(), "{}: nothing was read", source.display());
    let imports = imports(&files);
    let mut found = BTreeMap::<BTreeSet<String>, String>::new();
    let name =
        |module: &ModulePath| files[module].path.strip_prefix(source).unwrap().to_string_lossy().into_owned();
    for start in files.keys() {
        let Some(way) = circle(&imports, start) else { continue };
        let mut words = String::new();
        for (from, to) in way.iter().zip(way.iter().cycle().skip(1)) {
            writeln!(words, "    {} imports {} ({})", name(from), name(to), imports[from][*to]).unwrap();
        }
        found.entry(way.into_iter().map(name).collect()).or_insert(words);
    }
    found.into_values().collect()
}

#[test]
fn no_file_imports_itself_through_others() {
    let mut found = String::new();
    for source in super::sources() {
        let package = source.parent().unwrap().strip_prefix(super::root()).unwrap().display().to_string();
        for words in circles(&source) {
            writeln!(found, "{package}:\n{words}").unwrap();
        }
    }
    assert!(found.is_empty(), "files that import each other in a circle:\n{found}");
}
