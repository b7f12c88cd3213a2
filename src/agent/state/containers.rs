//! The containers of the agent's state, by id. A full node has a thousand, of which few are not at
//! rest: after an input, only these are looked at.

use std::{
    collections::{HashMap, HashSet},
    hash::BuildHasher,
};

use super::container::Container;
use crate::model::container_id::ContainerId;

#[derive(Debug, Default)]
pub(super) struct Containers {
    all: HashMap<ContainerId, Container>,
    /// Those that may not be at rest: each that was borrowed mutably, until [`Containers::settle`].
    active: HashSet<ContainerId>,
}

impl Containers {
    pub(super) fn get(&self, id: &ContainerId) -> Option<&Container> {
        self.all.get(id)
    }

    pub(super) fn get_mut(&mut self, id: &ContainerId) -> Option<&mut Container> {
        let container = self.all.get_mut(id)?;
        self.active.insert(id.clone());
        Some(container)
    }

    pub(super) fn get_or_insert_with(
        &mut self,
        id: &ContainerId,
        make: impl FnOnce() -> Container,
    ) -> &mut Container {
        self.active.insert(id.clone());
        self.all.entry(id.clone()).or_insert_with(make)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&ContainerId, &Container)> {
        self.all.iter()
    }

    pub(super) fn all_mut(&mut self) -> impl Iterator<Item = &mut Container> {
        self.active.extend(self.all.keys().cloned());
        self.all.values_mut()
    }

    /// Those of one of so many parts. A container stays in its part.
    pub(super) fn part_mut(
        &mut self,
        part: u32,
        parts: u32,
    ) -> impl Iterator<Item = &mut Container> {
        let hasher = self.all.hasher().clone();
        let (part, parts) = (u64::from(part), u64::from(parts));
        let in_part = move |id: &ContainerId| hasher.hash_one(id) % parts == part;
        let active = &mut self.active;
        self.all.iter_mut().filter(move |(id, _)| in_part(id)).map(|(id, container)| {
            active.insert(id.clone());
            container
        })
    }

    pub(super) fn remove(&mut self, id: &ContainerId) {
        self.all.remove(id);
        self.active.remove(id);
    }

    pub(super) fn retain(&mut self, keep: impl Fn(&ContainerId, &Container) -> bool) {
        let active = &mut self.active;
        self.all.retain(|id, container| {
            let kept = keep(id, container);
            if !kept {
                active.remove(id);
            }
            kept
        });
    }

    /// Those that may not be at rest.
    pub(super) fn active(&self) -> impl Iterator<Item = &Container> {
        self.active.iter().filter_map(|id| self.all.get(id))
    }

    pub(super) fn for_each_active(&mut self, mut visit: impl FnMut(&ContainerId, &mut Container)) {
        for id in &self.active {
            if let Some(container) = self.all.get_mut(id) {
                visit(id, container);
            }
        }
    }

    /// Forgets those of [`Containers::active`] that are at rest.
    pub(super) fn settle(&mut self) {
        let all = &self.all;
        self.active.retain(|id| all.get(id).is_some_and(|container| !container.is_at_rest()));
    }
}
